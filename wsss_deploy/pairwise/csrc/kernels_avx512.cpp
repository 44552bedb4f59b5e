// GCC 12 warns about its own header (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "plan.h"

namespace wsss {
namespace {
inline __m512 from_half(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void to_half(Half* to, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline __m512 from_level(const Level* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
// Rounds to the nearest level; above the highest is the highest.
inline void to_level(Level* to, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtusepi32_epi16(_mm512_cvtps_epi32(value)));
}
}  // namespace
}  // namespace wsss

#define WSSS_COMPACT
#define WSSS_BYTES 64
#define WSSS_CHANNELS 24
#define WSSS_TABLE kernels_avx512
#define WSSS_ENERGY_TABLE energy_kernels_avx512
#include "kernels.inc"
#include "energy_kernels.inc"
