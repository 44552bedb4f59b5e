// What a call of the operator needs beside its arrays; built once per parameters object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace wsss {

// A window of radius 32; the kernels keep a row pointer for each neighbour on the stack.
constexpr int max_neighbours = 65 * 65 - 1;

enum class Kind : int { par = 0, varm = 1, gaussian = 2 };

// One joint Gaussian; an inverse variance of 0 leaves its part out.
struct Term {
  double weight, xy, rgb, features;
};

struct Plan {
  Kind kind;
  std::vector<int> dy, dx;
  std::vector<double> position;  // second * beta_k of kind par
  std::vector<Term> terms;
  double bandwidth, second, scale;
  bool normalise;
  int reach;
  float levels = 0;  // Compact storage: how many of its levels are 1
  int count() const { return static_cast<int>(dy.size()); }
};

// An image in the layout of the kernels: row by row, in a row channel by channel, each with `left` (and at least as
// many right) edge values beside it, so that a neighbour is one unaligned load and never needs a clamp in x.
// The pitch is an odd number of cache lines: channels at one x then fall into different cache sets.
template <class S>
struct Packed {
  S* data = nullptr;
  int channels = 0, height = 0, width = 0;
  int left = 0;
  std::ptrdiff_t pitch = 0;
  S* row(int y, int c) const { return data + (std::ptrdiff_t(y) * channels + c) * pitch + left; }
};

// Where a step writes: element (c, x) of the row is at data[c * stride + x]; x below `limit` may be written.
template <class S>
struct RowTarget {
  S* data;
  std::ptrdiff_t stride;
  int limit;
};

// Channels of a guide that the affinity works on at a time; it keeps their differences in its scratch.
constexpr int affinity_scratch = 3;

// Weights and the masks between steps as they are computed ...
template <class T>
struct Stored {
  using Weight = T;
  using Mask = T;
};
// ... or in 16 bits, for masks in [0, 1] and weights that are nowhere negative and add up to little more than 1: weights as
// float16, of which in a flat area all would be rounded the same way, so that behind each block there are `lanes` floats that
// set its sums right; masks in 65535 levels, as float16 would hold a probability near 1 to 5e-4 only.
struct Compact {};
struct Half {
  std::uint16_t bits;
};
struct Level {
  std::uint16_t value;
};
constexpr float most_levels = 65535;
template <>
struct Stored<Compact> {
  using Weight = Half;
  using Mask = Level;
};
template <class T>
using Weight = typename Stored<T>::Weight;
template <class T>
using Mask = typename Stored<T>::Mask;

// Values of `Weight<T>` that a block of weights takes.
template <class S, class T>
constexpr std::size_t block_values(int count, int lanes) {
  constexpr std::size_t behind = std::is_same_v<S, T> ? 0 : sizeof(S) / sizeof(Weight<T>);
  return std::size_t(lanes) * (std::size_t(count) + behind);
}

// One instruction set's kernels: arithmetic in S, storage by T (S, or Compact for less to move). Weights are in blocks of
// `lanes` pixels: w[block][k][lane].
template <class S, class T = S>
struct Kernels {
  int lanes;
  // Weights of the blocks [first, last) of row y; scratch holds (1 + affinity_scratch) * count() * lanes values. False if
  // one of them cannot be stored.
  bool (*affinity)(const Plan&, const Packed<S>& guide, int y, int first, int last, Weight<T>* weights, S* scratch);
  // Weighted sums of the blocks [first, last) of row y; `next`: the weights used after these, to be prefetched, or null.
  void (*step)(const Plan&, const Packed<Mask<T>>& masks, int y, int first, int last, const Weight<T>* weights,
               const Weight<T>* next, RowTarget<Mask<T>>);
  // The same, as values of S.
  void (*last_step)(const Plan&, const Packed<Mask<T>>& masks, int y, int first, int last, const Weight<T>* weights,
                    const Weight<T>* next, RowTarget<S>);
  // In place: softmax over channels of unary + compatibility * value; unary (c, x) at unary[c * unary_stride + x].
  void (*softmax)(int channels, int width, int first, int last, const S* unary, std::ptrdiff_t unary_stride,
                  double compatibility, RowTarget<S>);
  // Values of masks as they are stored; false if one of them cannot be.
  bool (*pack)(const Plan&, const S* from, Mask<T>* to, int count);
};

// Each instruction set's for (float, float), (double, double) and, but for the base, (float, Compact).
template <class S, class T = S>
const Kernels<S, T>& kernels_base();
template <class S, class T = S>
const Kernels<S, T>& kernels_avx2();
template <class S, class T = S>
const Kernels<S, T>& kernels_avx512();

}  // namespace wsss
