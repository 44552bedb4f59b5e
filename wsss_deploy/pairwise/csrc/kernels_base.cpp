#define WSSS_BYTES 16
#define WSSS_CHANNELS 12
#define WSSS_TABLE kernels_base
#include "kernels.inc"
