#define WSSS_BYTES 32
#define WSSS_CHANNELS 12
#define WSSS_TABLE kernels_avx2
#define WSSS_ENERGY_TABLE energy_kernels_avx2
#include "kernels.inc"
#include "energy_kernels.inc"
