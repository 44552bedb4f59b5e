#define WSSS_BYTES 16
#define WSSS_CHANNELS 12
#define WSSS_TABLE kernels_base
#define WSSS_ENERGY_TABLE energy_kernels_base
#include "kernels.inc"
#include "energy_kernels.inc"
