// The CUDA form of the pairwise operator, compiled by NVRTC to PTX: the same arithmetic as the CPU's kernels.
//
// Parameters are compiled in (cuda_source.py writes these): WSSS_KIND (0 par, 1 varm, 2 gaussian), WSSS_COUNT (K),
// WSSS_DY, WSSS_DX, WSSS_POSITION (lists of K), WSSS_TERMS (list of {weight, xy, rgb, features}), WSSS_TERM_COUNT,
// WSSS_BANDWIDTH, WSSS_SECOND, WSSS_SCALE, WSSS_NORMALISE, WSSS_COMPATIBILITY, WSSS_STORAGE (float or __half).
// Sums are in float whatever the storage. Arguments are inputs, sizes, outputs, in the order that TensorRT asks for.
// One thread a pixel; blocks are one-dimensional over batch * height * width.
#include "arithmetic.h"

using namespace wsss;
using Storage = WSSS_STORAGE;

__constant__ int offset_y[WSSS_COUNT] = {WSSS_DY};
__constant__ int offset_x[WSSS_COUNT] = {WSSS_DX};
#if WSSS_KIND == 0
__constant__ float position[WSSS_COUNT] = {WSSS_POSITION};
#endif
#if WSSS_KIND == 2
struct Term {
  float weight, xy, rgb, features;
};
__constant__ Term terms[WSSS_TERM_COUNT] = {WSSS_TERMS};
#endif

namespace {

// A pixel and its neighbours' places in a plane of H * W values.
struct Pixel {
  long long image;  // number in the batch
  int y, x, height, width, plane;
  __device__ Pixel(long long index, int height, int width)
      : image(index / (height * width)), height(height), width(width), plane(height * width) {
    const int rest = int(index % plane);
    y = rest / width;
    x = rest % width;
  }
  __device__ int here() const { return y * width + x; }
  __device__ int neighbour(int k, int down, int right) const {
    return clamped(y + down + offset_y[k], height) * width + clamped(x + right + offset_x[k], width);
  }
  __device__ bool inside(int k) const {
    const int ny = y + offset_y[k], nx = x + offset_x[k];
    return ny >= 0 && ny < height && nx >= 0 && nx < width;
  }
};

#if WSSS_KIND != 2
__device__ void contrast(const Storage* guide, int channels, const Pixel& p, float* scores) {
  for (int k = 0; k < WSSS_COUNT; ++k) scores[k] = 0.0f;
  for (int c = 0; c < channels; ++c) {
    const Storage* plane = guide + (p.image * channels + c) * p.plane;
    const float centre = float(plane[p.here()]), first = float(plane[p.neighbour(0, 0, 0)]);
    float sum = 0.0f, squares = 0.0f;
    // From the first neighbour on, so that the squares are exactly 0 where all neighbours are the same.
    for (int k = 0; k < WSSS_COUNT; ++k) sum += float(plane[p.neighbour(k, 0, 0)]) - first;
    const float mean = sum * (1.0f / WSSS_COUNT);
    for (int k = 0; k < WSSS_COUNT; ++k) {
      const float deviation = float(plane[p.neighbour(k, 0, 0)]) - first - mean;
      squares += deviation * deviation;
    }
    const float factor = contrast_factor(squares, 1.0f / (WSSS_COUNT - 1), float(WSSS_BANDWIDTH), 1.0f / channels);
    for (int k = 0; k < WSSS_COUNT; ++k) {
      const float difference = float(plane[p.neighbour(k, 0, 0)]) - centre;
      scores[k] -= difference * difference * factor;
    }
  }
}

// scores[k] <- exp(bounded scores[k] - max); the sum's inverse.
__device__ float softmax_powers(float* scores) {
  float top = bounded(scores[0]), sum = 0.0f;
  for (int k = 1; k < WSSS_COUNT; ++k) top = larger(top, scores[k]);
  for (int k = 0; k < WSSS_COUNT; ++k) {
    scores[k] = exponential(bounded(scores[k]) - top);
    sum += scores[k];
  }
  return 1.0f / sum;
}
#endif

#if WSSS_KIND == 1
__device__ void variation(const Storage* guide, int channels, const Pixel& p, float* result) {
  for (int k = 0; k < WSSS_COUNT; ++k) {
    float total = 0.0f;
    for (int c = 0; c < channels; ++c) {
      const Storage* plane = guide + (p.image * channels + c) * p.plane;
      const float value = float(plane[p.neighbour(k, 0, 0)]);
      const float dy = p.y + 1 < p.height ? float(plane[p.neighbour(k, 1, 0)]) - value : 0.0f;
      const float dx = p.x + 1 < p.width ? float(plane[p.neighbour(k, 0, 1)]) - value : 0.0f;
      total += dx * dx + dy * dy;
    }
    result[k] = total / channels;
  }
}
#endif

}  // namespace

extern "C" __global__ void wsss_pairwise_affinity(const Storage* guide, int batch, int channels, int height, int width,
                                                  Storage* weights) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  Storage* out = weights + p.image * WSSS_COUNT * p.plane + p.here();
  float w[WSSS_COUNT];
#if WSSS_KIND == 2
  float sum = 0.0f;
  for (int k = 0; k < WSSS_COUNT; ++k) {
    float total = 0.0f;
    const float distance = float(offset_y[k] * offset_y[k] + offset_x[k] * offset_x[k]);
    for (int t = 0; t < WSSS_TERM_COUNT; ++t) {
      float exponent = -0.5f * terms[t].xy * distance;
      for (int c = 0; c < channels; ++c) {
        const Storage* plane = guide + (p.image * channels + c) * p.plane;
        const float factor = 0.5f * (c < 3 ? terms[t].rgb : terms[t].features);
        if (factor == 0.0f) continue;
        const float difference = float(plane[p.neighbour(k, 0, 0)]) - float(plane[p.here()]);
        exponent -= difference * difference * factor;
      }
      total += exponential(exponent) * terms[t].weight;
    }
    w[k] = total * (p.inside(k) ? 1.0f : 0.0f);
    sum += w[k];
  }
  const float divisor = WSSS_NORMALISE && sum != 0.0f ? sum : 1.0f;
  for (int k = 0; k < WSSS_COUNT; ++k) out[(long long)k * p.plane] = Storage(w[k] / divisor);
#else
  contrast(guide, channels, p, w);
  const float inverse = softmax_powers(w);
#if WSSS_KIND == 0
  for (int k = 0; k < WSSS_COUNT; ++k)
    out[(long long)k * p.plane] = Storage(par_weight(w[k], inverse, position[k], float(WSSS_SCALE)));
#else
  float tau[WSSS_COUNT];
  variation(guide, channels, p, tau);
  const float tau_inverse = softmax_powers(tau);
  for (int k = 0; k < WSSS_COUNT; ++k)
    out[(long long)k * p.plane] =
        Storage(varm_weight(w[k], inverse, tau[k], tau_inverse, float(WSSS_SECOND), float(WSSS_SCALE)));
#endif
#endif
}

namespace {
constexpr int channel_block = 8;

// The weighted sums of one pixel, eight channels at a time: a weight is loaded once for eight.
template <class Write>
__device__ void sums(const Storage* masks, const Storage* weights, int channels, const Pixel& p, Write write) {
  const Storage* w = weights + p.image * WSSS_COUNT * p.plane + p.here();
  for (int first = 0; first < channels; first += channel_block) {
    const Storage* plane = masks + (p.image * channels + first) * p.plane;
    const int count = channels - first < channel_block ? channels - first : channel_block;
    float total[channel_block] = {};
    for (int k = 0; k < WSSS_COUNT; ++k) {
      const float weight = float(w[(long long)k * p.plane]);
      const Storage* from = plane + p.neighbour(k, 0, 0);
#pragma unroll
      for (int c = 0; c < channel_block; ++c)
        if (c < count) total[c] += weight * float(from[(long long)c * p.plane]);
    }
#pragma unroll
    for (int c = 0; c < channel_block; ++c)
      if (c < count) write(first + c, total[c]);
  }
}
}  // namespace

extern "C" __global__ void wsss_pairwise_step(const Storage* masks, const Storage* weights, int batch, int channels,
                                              int height, int width, Storage* out) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  Storage* to = out + p.image * channels * p.plane + p.here();
  sums(masks, weights, channels, p, [&](int c, float total) { to[(long long)c * p.plane] = Storage(total); });
}

extern "C" __global__ void wsss_pairwise_mean_field_step(const Storage* masks, const Storage* weights,
                                                         const Storage* unary, int batch, int channels, int height,
                                                         int width, Storage* out) {
  const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  const long long start = p.image * channels * p.plane + p.here();
  float top = 0.0f, sum = 0.0f;
  sums(masks, weights, channels, p, [&](int c, float total) {
    const float score = float(unary[start + (long long)c * p.plane]) + total * float(WSSS_COMPATIBILITY);
    top = c == 0 ? score : larger(top, score);
    out[start + (long long)c * p.plane] = Storage(score);
  });
  for (int c = 0; c < channels; ++c) {
    const float power = exponential(float(out[start + (long long)c * p.plane]) - top);
    out[start + (long long)c * p.plane] = Storage(power);
    sum += power;
  }
  for (int c = 0; c < channels; ++c)
    out[start + (long long)c * p.plane] = Storage(float(out[start + (long long)c * p.plane]) / sum);
}
