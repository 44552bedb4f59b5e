#include <immintrin.h>

#include "plan.h"

namespace wsss {
namespace {
inline __m256 from_half(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void to_half(Half* to, __m256 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 from_level(const Level* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// Rounds to the nearest level; above the highest is the highest.
inline void to_level(Level* to, __m256 value) {
  const __m256i whole = _mm256_cvtps_epi32(value);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
}
}  // namespace
}  // namespace wsss

#define WSSS_COMPACT
#define WSSS_BYTES 32
#define WSSS_CHANNELS 12
#define WSSS_TABLE kernels_avx2
#define WSSS_ENERGY_TABLE energy_kernels_avx2
#include "kernels.inc"
#include "energy_kernels.inc"
