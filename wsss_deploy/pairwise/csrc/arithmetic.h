// The per-pixel arithmetic of the pairwise operator, shared by the C++ and the CUDA sources.
//
// Every function is a template over V: float or double on a GPU, a vector of neighbouring pixels on a CPU (GCC and
// Clang vector types, on which + - * / < and ?: work lane by lane). So CPU tests exercise what the GPU runs.
// NaN is kept on purpose: comparisons are written so that a NaN falls through to the result.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define WSSS_INLINE __host__ __device__ __forceinline__
#else
#include <cmath>
#include <cstring>
#define WSSS_INLINE inline __attribute__((always_inline))
using std::memcpy;  // NVRTC knows both by these names without any header
using std::sqrt;
#endif

namespace wsss {

// Traits of a number type: its scalar, the unsigned integer of the same layout, its square root.
template <class V>
struct Number;

template <>
struct Number<float> {
  using Scalar = float;
  using Word = unsigned int;
  using Bits = unsigned int;
  static WSSS_INLINE float root(float v) { return sqrt(v); }
};

template <>
struct Number<double> {
  using Scalar = double;
  using Word = unsigned long long;
  using Bits = unsigned long long;
  static WSSS_INLINE double root(double v) { return sqrt(v); }
};

template <class To, class From>
WSSS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// exp(r) for |r| <= ln(2) / 2 as a polynomial; relative error 1e-7 and 2e-16.
template <class V>
WSSS_INLINE V exp_reduced(V r, float) {
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

template <class V>
WSSS_INLINE V exp_reduced(V r, double) {
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return p * (r * r) + r + 1.0;
}

// exp(x) for x <= 0; 0 where the result would not be a normal number; NaN stays NaN.
template <class V>
WSSS_INLINE V exponential(V x) {
  using S = typename Number<V>::Scalar;
  using Bits = typename Number<V>::Bits;
  using Word = typename Number<V>::Word;
  constexpr bool single = sizeof(S) == 4;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves that integer in the low bits.
  constexpr S magic = single ? S(12582912.0) : S(6755399441055744.0);
  constexpr S high = single ? S(0.693359375) : S(6.93145751953125e-1);
  constexpr S low = single ? S(-2.12194440e-4) : S(1.42860682030941723212e-6);
  constexpr Word shift = single ? 23 : 52;
  constexpr Word bias = single ? 127 : 1023;
  const V shifted = x * S(1.44269504088896340736) + magic;
  const V n = shifted - magic;
  const V r = (x - n * high) - n * low;
  const Bits power = (bit_cast<Bits>(shifted) + bias) << shift;
  const V result = exp_reduced(r, S()) * bit_cast<V>(power);
  return x < (single ? S(-87) : S(-708)) ? V{} : result;
}

// Factor f of one guide channel such that the contrast is -(n - I)^2 f:  f = 1 / ((std + 1e-8) bandwidth)^2 / G.
// `squares` is the sum over the K neighbours of squared deviations from their mean (sample variance, K - 1). Where it is
// 0, all contrasts of the channel are the same and cancel in the softmax, unless rounding of their 1e12 and more swallows
// the other channels; f = 0 leaves them out.
template <class V, class S>
WSSS_INLINE V contrast_factor(V squares, S inverse_count, S bandwidth, S inverse_channels) {
  const V deviation = (Number<V>::root(squares * inverse_count) + S(1e-8)) * bandwidth;
  return squares == S(0) ? V{} : inverse_channels / (deviation * deviation);
}

// The softmax's scores are held above this, so that contrasts of 1e8 squared stay finite.
template <class V>
WSSS_INLINE V bounded(V score) {
  using S = typename Number<V>::Scalar;
  const V lowest = V{} - S(1e30);
  return score < lowest ? lowest : score;
}

template <class V>
WSSS_INLINE V larger(V a, V b) {
  return a < b ? b : a;
}

// par: (alpha + second * beta) * scale;  varm: (alpha - second * tau) * scale.
template <class V, class S>
WSSS_INLINE V par_weight(V exponent, V inverse_sum, S second_beta, S scale) {
  return (exponent * inverse_sum + second_beta) * scale;
}

template <class V, class S>
WSSS_INLINE V varm_weight(V exponent, V inverse_sum, V tau, V tau_inverse_sum, S second, S scale) {
  return (exponent * inverse_sum - tau * tau_inverse_sum * second) * scale;
}

// energy: the gate of the unordered pair {i, j}, both directions together: d_i s_j + s_i d_j.
template <class V>
WSSS_INLINE V pair_gate(V source_i, V destination_i, V source_j, V destination_j) {
  return destination_i * source_j + source_i * destination_j;
}

// energy: one Gaussian of a pair, factor * exp(-squares / 2); the factor holds its weight, position and gate.
template <class V, class S>
WSSS_INLINE V gaussian_power(V squares, S factor) {
  return exponential(squares * typename Number<V>::Scalar(-0.5)) * factor;
}

WSSS_INLINE int clamped(int position, int size) {
  return position < 0 ? 0 : (position < size ? position : size - 1);
}

}  // namespace wsss
