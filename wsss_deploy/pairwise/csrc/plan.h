// What a call of the operator needs beside its arrays; built once per parameters object.
#pragma once

#include <cstddef>
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

// One instruction set's kernels. Weights are in blocks of `lanes` pixels: w[block][k][lane].
template <class S>
struct Kernels {
  int lanes;
  // Weights of the blocks [first, last) of row y; scratch holds affinity_scratch * count() * lanes values.
  void (*affinity)(const Plan&, const Packed<S>& guide, int y, int first, int last, S* weights, S* scratch);
  // Weighted sums of the blocks [first, last) of row y; `next`: the weights used after these, to be prefetched, or null.
  void (*step)(const Plan&, const Packed<S>& masks, int y, int first, int last, const S* weights, const S* next,
               RowTarget<S>);
  // In place: softmax over channels of unary + compatibility * value; unary (c, x) at unary[c * unary_stride + x].
  void (*softmax)(int channels, int width, int first, int last, const S* unary, std::ptrdiff_t unary_stride,
                  double compatibility, RowTarget<S>);
};

template <class S>
const Kernels<S>& kernels_base();
template <class S>
const Kernels<S>& kernels_avx2();
template <class S>
const Kernels<S>& kernels_avx512();

}  // namespace wsss
