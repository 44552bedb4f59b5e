// The CUDA form of the pair energy, compiled by NVRTC to PTX: the same arithmetic as the CPU's kernels.
//
// Compiled in (energy_cuda_source.py writes these): WSSS_REAL (float or double), WSSS_RADIUS, WSSS_CLASSES (channels of
// left and right), WSSS_FEATURES (channels of all terms' maps together), WSSS_TERMS (list of {weight, xy, first channel,
// channels, wanted}), WSSS_TERM_COUNT, WSSS_POTTS. One thread a pixel, blocks are one-dimensional over
// batch * height * width. Every thread sums over its whole window: each weight is computed twice, and nothing is
// scattered, so there are no atomics and the result is the same on every run.
#include "arithmetic.h"

using namespace wsss;
using Real = WSSS_REAL;

struct Term {
  Real weight, xy;
  int first, channels;
  bool wanted;
};
__constant__ Term terms[WSSS_TERM_COUNT] = {WSSS_TERMS};

namespace {

// A pixel's place in a plane of H * W values.
struct Pixel {
  int image, y, x, plane;
  __device__ Pixel(long long index, int height, int width) : plane(height * width) {
    image = int(index / plane);
    const int rest = int(index % plane);
    y = rest / width;
    x = rest % width;
  }
};

// Calls visit(offset of the neighbour in a plane, dy, dx) for the window's pixels that are in the image.
template <class Visit>
__device__ void window(const Pixel& p, int height, int width, Visit visit) {
  const int top = p.y < WSSS_RADIUS ? -p.y : -WSSS_RADIUS, left = p.x < WSSS_RADIUS ? -p.x : -WSSS_RADIUS;
  const int bottom = height - 1 - p.y < WSSS_RADIUS ? height - 1 - p.y : WSSS_RADIUS;
  const int right = width - 1 - p.x < WSSS_RADIUS ? width - 1 - p.x : WSSS_RADIUS;
  for (int dy = top; dy <= bottom; ++dy)
    for (int dx = left; dx <= right; ++dx)
      if (dy != 0 || dx != 0) visit(dy * width + dx, dy, dx);
}

__device__ Real term_weight(const Term& term, Real gate, const Real* features, int plane, int to, int dy, int dx) {
  Real squares = term.xy * Real(dy * dy + dx * dx);
  for (int c = term.first; c < term.first + term.channels; ++c) {
    const Real* map = features + (long long)c * plane;
    const Real difference = map[to] - map[0];
    squares += difference * difference;
  }
  return gaussian_power(squares, gate * term.weight);
}

}  // namespace

// left, right (N, classes, H, W), with Potts both the probabilities; gates (N, 1, H, W); features (N, channels, H, W),
// divided by their sigmas. sums as right, values (N, 1, H, W): each pixel's part of the energy.
extern "C" __global__ void wsss_pairwise_energy(const Real* left, const Real* right, const Real* source,
                                                const Real* destination, const Real* features, int batch, int height,
                                                int width, Real* sums, Real* values) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  const long long here = (long long)p.image * WSSS_CLASSES * p.plane + p.y * width + p.x;
  const Real* maps = features + (long long)p.image * WSSS_FEATURES * p.plane + p.y * width + p.x;
  Real total[WSSS_CLASSES] = {}, weights = Real(0), dot = Real(0);
  window(p, height, width, [&](int to, int dy, int dx) {
    const Real gate = pair_gate(source[index], destination[index], source[index + to], destination[index + to]);
    Real weight = Real(0);
#pragma unroll
    for (int t = 0; t < WSSS_TERM_COUNT; ++t) weight += term_weight(terms[t], gate, maps, p.plane, to, dy, dx);
    weights += weight;
#pragma unroll
    for (int c = 0; c < WSSS_CLASSES; ++c) total[c] += weight * right[here + (long long)c * p.plane + to];
  });
#pragma unroll
  for (int c = 0; c < WSSS_CLASSES; ++c) {
    dot += total[c] * left[here + (long long)c * p.plane];
    sums[here + (long long)c * p.plane] = WSSS_POTTS ? -total[c] : total[c];
  }
  values[index] = (WSSS_POTTS ? weights - dot : dot) * Real(0.5);
}

// The gradient of the energy to the features of the wanted terms; the other channels are not written.
extern "C" __global__ void wsss_pairwise_energy_features(const Real* left, const Real* right, const Real* source,
                                                         const Real* destination, const Real* features, int batch,
                                                         int height, int width, Real* gradients) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  const long long here = (long long)p.image * WSSS_CLASSES * p.plane + p.y * width + p.x;
  const long long start = (long long)p.image * WSSS_FEATURES * p.plane + p.y * width + p.x;
  const Real* maps = features + start;
  Real total[WSSS_FEATURES + 1] = {};
  window(p, height, width, [&](int to, int dy, int dx) {
    const Real gate = pair_gate(source[index], destination[index], source[index + to], destination[index + to]);
    Real dot = Real(0);
#pragma unroll
    for (int c = 0; c < WSSS_CLASSES; ++c)
      dot += left[here + (long long)c * p.plane] * right[here + (long long)c * p.plane + to];
    const Real energy = WSSS_POTTS ? Real(1) - dot : dot;
    for (const Term& term : terms) {
      if (!term.wanted) continue;
      const Real pull = energy * term_weight(term, gate, maps, p.plane, to, dy, dx);
      for (int c = term.first; c < term.first + term.channels; ++c)
        total[c] += pull * (maps[(long long)c * p.plane + to] - maps[(long long)c * p.plane]);
    }
  });
  for (const Term& term : terms)
    for (int c = term.first; term.wanted && c < term.first + term.channels; ++c)
      gradients[start + (long long)c * p.plane] = total[c];
}
