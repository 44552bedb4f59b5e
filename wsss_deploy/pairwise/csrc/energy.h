// The energy of pixel pairs within a window, and its gradient: what the driver and the kernels share.
//
// One sweep over the rows does both. The weight w_ij of an unordered pair is computed once, at the upper (or left) of
// its two pixels, and kept for the window's rows in a ring; every pixel then sums w_ij * right_j over its whole
// window. Nothing is scattered, so each value has one writer and one order of additions, whatever the threads.
#pragma once

#include <cstddef>
#include <vector>

namespace wsss {

// Offsets beyond this would make the ring of weights large; the caller takes another form for those.
constexpr int max_energy_radius = 32;

// weight * exp(-xy / 2 * offset^2 - |f_i - f_j|^2 / 2); `feature` numbers the map f, -1 is none.
struct EnergyTerm {
  double weight, xy;
  int feature;
  bool wanted;  // the gradient to the map
};

// potts: e_ij = 1 - <p_i, p_j>, the sums are -sum_j w_ij p_j. Else e_ij = <left_i, right_j>, sum_j w_ij right_j.
struct EnergyPlan {
  int radius;
  std::vector<EnergyTerm> terms;
  bool potts;
};

template <class S>
struct EnergyFeature {
  const S* data;  // (N, channels, H, W)
  int channels;
  S* gradient;  // as data, or null
};

// All arrays are contiguous. Without gates (both null) a pair's gate is 1.
template <class S>
struct EnergyArrays {
  int batch, channels, height, width;
  const S *left, *right;         // (N, channels, H, W); potts: both the probabilities
  const S *source, *destination;  // (N, 1, H, W)
  std::vector<EnergyFeature<S>> features;
  S* sums;  // (N, channels, H, W)
};

// Rows of several channels, the newest `slots` of them; x runs from -margin, zeros lie outside the image.
template <class S>
struct EnergyRing {
  S* data = nullptr;
  int channels = 0, slots = 1, margin = 0;
  std::ptrdiff_t pitch = 0;
  S* at(int row, int channel) const {
    return data + (std::ptrdiff_t(row % slots) * channels + channel) * pitch + margin;
  }
  std::size_t size() const { return std::size_t(slots) * std::size_t(channels) * std::size_t(pitch); }
};

// One neighbour of two rows' pixels: its values and its weights to the upper and the lower row, all at x = 0.
template <class S>
struct EnergyNeighbour {
  const S* values;
  const S* weights[2];
};

// What a kernel needs for the rows of one strip.
// Channels of `maps`: source, destination, the terms' features one after another, right, left.
// Channels of `weights`: offset k's sum of all terms at k; then, per wanted term, its share times e_ij.
template <class S>
struct EnergyStrip {
  const EnergyPlan* plan;
  const int *dy, *dx;       // half of the window
  const S* factors;         // [k][term]: weight and position
  const int* first_channel;  // of a term's features in `maps`
  const int* term_channels;
  int offsets, reach_y, reach_x, classes, height, right, left;
  EnergyRing<S> maps, weights;
  EnergyNeighbour<S>* neighbours;  // scratch, (2 reach_y + 2) (2 reach_x + 1)
};

// Where results of a row go: element (c, x) at data[c * plane + x], of the next row `row` further on; x below `room`
// exists.
template <class S>
struct EnergyTarget {
  S* data;
  std::ptrdiff_t plane, row;
  int room;
};

template <class S>
struct EnergyKernels {
  int lanes;
  // Weights of row y at the pixels [first, last) (multiples of lanes), for offsets with dy >= least.
  void (*weights)(const EnergyStrip<S>&, int y, int first, int last, int least);
  // Sums of `rows` rows, 1 or 2, from y on; adds sum over pixels of <left, sums> (potts: sum w - <p, sum w p>) to values.
  void (*sums)(const EnergyStrip<S>&, int y, int rows, EnergyTarget<S>, double* values);
  // Gradient of row y to the features of a wanted term, the `plane`-th of those.
  void (*feature_gradient)(const EnergyStrip<S>&, int y, int term, int plane, EnergyTarget<S>);
};

template <class S>
const EnergyKernels<S>& energy_kernels_base();
template <class S>
const EnergyKernels<S>& energy_kernels_avx2();
template <class S>
const EnergyKernels<S>& energy_kernels_avx512();

// As kernels_named in driver.h.
template <class S>
const EnergyKernels<S>* energy_kernels_named(const char* name);

// Writes sums and the wanted gradients; returns the energy.
template <class S>
double energy(const EnergyPlan&, const EnergyKernels<S>&, const EnergyArrays<S>&, int threads);

}  // namespace wsss
