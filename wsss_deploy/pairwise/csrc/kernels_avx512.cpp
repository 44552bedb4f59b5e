#define WSSS_BYTES 64
#define WSSS_CHANNELS 24
#define WSSS_TABLE kernels_avx512
#define WSSS_ENERGY_TABLE energy_kernels_avx512
#include "kernels.inc"
#include "energy_kernels.inc"
