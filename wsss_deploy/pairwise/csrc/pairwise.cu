// The CUDA form of the pairwise operator, compiled by NVRTC to PTX: the same arithmetic as the CPU's kernels.
//
// Parameters are compiled in (cuda_source.py writes these): WSSS_KIND (0 par, 1 varm, 2 gaussian), WSSS_COUNT (K),
// WSSS_DY, WSSS_DX, WSSS_POSITION (lists of K), WSSS_TERMS (list of {weight, xy, rgb, features}), WSSS_TERM_COUNT,
// WSSS_BANDWIDTH, WSSS_SECOND, WSSS_SCALE, WSSS_NORMALISE, WSSS_COMPATIBILITY, WSSS_STORAGE (float or __half), and how a
// step groups the neighbours: WSSS_ALIGNED, WSSS_NEAR, WSSS_REST (lists) with their lengths WSSS_..._COUNT and where in NEAR
// each distance starts, WSSS_NEAR_START; WSSS_BLOCK, the most threads of a block.
// Sums are in float whatever the storage. Arguments are inputs, sizes, outputs, in the order that TensorRT asks for.
// As many threads as pixels; blocks are one-dimensional over batch * height * width.
#include "arithmetic.h"

using namespace wsss;
using Storage = WSSS_STORAGE;

__constant__ int offset_y[WSSS_COUNT] = {WSSS_DY};
__constant__ int offset_x[WSSS_COUNT] = {WSSS_DX};
#if WSSS_KIND == 0
__constant__ float position[WSSS_COUNT] = {WSSS_POSITION};
#endif
__constant__ int aligned_offsets[WSSS_ALIGNED_COUNT + 1] = {WSSS_ALIGNED};
__constant__ int rest_offsets[WSSS_REST_COUNT + 1] = {WSSS_REST};

// Neighbours of one row at -distance, 0 and +distance: their numbers, -1 for one that is none. Those of distance d are
// the rows from near_start[d - 1] to near_start[d].
struct Near {
  int dy, left, middle, right;
};
__constant__ Near near_rows[WSSS_NEAR_COUNT + 1] = {WSSS_NEAR};
constexpr int near_start[4] = {WSSS_NEAR_START};

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

// A step moves little memory but takes every value K times from the nearest cache, whose width is what limits it: lanes
// that ask for a pixel each, beginning anywhere, get it in twice as many pieces as lanes that ask for four aligned ones.
// So where rows are whole groups of four, a thread has four neighbouring pixels and a quarter of the channels.
namespace {
constexpr int group = 4;

struct alignas(group * sizeof(Storage)) Packed {
  Storage at[group];
};

struct Quad {
  float at[group];
};

__device__ bool is_packed(const void* address) { return (unsigned long long)address % sizeof(Packed) == 0; }

__device__ Quad load(const Storage* from) {
  const Packed packed = *reinterpret_cast<const Packed*>(from);
  Quad quad;
#pragma unroll
  for (int i = 0; i < group; ++i) quad.at[i] = float(packed.at[i]);
  return quad;
}

__device__ Quad repeated(float value) {
  Quad quad;
#pragma unroll
  for (int i = 0; i < group; ++i) quad.at[i] = value;
  return quad;
}

__device__ void add(Quad& total, const Quad& weight, const Quad& value) {
#pragma unroll
  for (int i = 0; i < group; ++i) total.at[i] += weight.at[i] * value.at[i];
}

// The four values `shift` to the right of the middle of three groups; to the left where it is negative.
template <int shift>
__device__ Quad shifted(const Quad& left, const Quad& middle, const Quad& right) {
  Quad quad;
#pragma unroll
  for (int i = 0; i < group; ++i) {
    const int from = i + shift;
    quad.at[i] = from < 0 ? left.at[(from + group) % group]
                          : (from < group ? middle.at[from % group] : right.at[from % group]);
  }
  return quad;
}

// Offsets smaller than a group: three aligned groups hold all that a row of them takes.
template <int count, int distance>
__device__ void add_near(const Storage* masks, const Storage* weights, long long stride, int channels, const Pixel& p,
                         Quad* total) {
  for (int row = near_start[distance - 1]; row < near_start[distance]; ++row) {
    const Near near = near_rows[row];
    const Quad left_weight = load(weights + (long long)near.left * p.plane);
    const Quad right_weight = load(weights + (long long)near.right * p.plane);
    const bool between = near.middle >= 0;
    const Quad middle_weight = between ? load(weights + (long long)near.middle * p.plane) : repeated(0.0f);
    const Storage* from = masks + clamped(p.y + near.dy, p.height) * p.width + p.x;
#pragma unroll
    for (int c = 0; c < count; ++c) {
      if (c >= channels) continue;
      const Storage* here = from + c * stride;
      const Quad middle = load(here);
      const Quad left = p.x > 0 ? load(here - group) : repeated(middle.at[0]);
      const Quad right = p.x + group < p.width ? load(here + group) : repeated(middle.at[group - 1]);
      add(total[c], left_weight, shifted<-distance>(left, middle, right));
      if (between) add(total[c], middle_weight, middle);  // a weight of 0 would let NaN in
      add(total[c], right_weight, shifted<distance>(left, middle, right));
    }
  }
}

// The weighted sums of four pixels in up to `count` channels, `stride` values apart; `masks` at the first one's plane,
// `weights` and `out` at the first pixel.
template <int count>
__device__ void step_of_group(const Storage* masks, const Storage* weights, long long stride, int channels,
                              const Pixel& p, Storage* out) {
  Quad total[count] = {};
  for (int i = 0; i < WSSS_ALIGNED_COUNT; ++i) {
    const int k = aligned_offsets[i];
    const Quad weight = load(weights + (long long)k * p.plane);
    // A whole group is inside or outside: column, offset and width are multiples of its size.
    const int column = p.x + offset_x[k];
    const bool inside = column >= 0 && column < p.width;
    const Storage* from = masks + clamped(p.y + offset_y[k], p.height) * p.width + clamped(column, p.width);
#pragma unroll
    for (int c = 0; c < count; ++c)
      if (c < channels) add(total[c], weight, inside ? load(from + c * stride) : repeated(float(from[c * stride])));
  }
  add_near<count, 1>(masks, weights, stride, channels, p, total);
  add_near<count, 2>(masks, weights, stride, channels, p, total);
  add_near<count, 3>(masks, weights, stride, channels, p, total);
  for (int i = 0; i < WSSS_REST_COUNT; ++i) {
    const int k = rest_offsets[i];
    const Quad weight = load(weights + (long long)k * p.plane);
    const Storage* from = masks + clamped(p.y + offset_y[k], p.height) * p.width;
    int columns[group];
#pragma unroll
    for (int pixel = 0; pixel < group; ++pixel) columns[pixel] = clamped(p.x + pixel + offset_x[k], p.width);
#pragma unroll
    for (int c = 0; c < count; ++c) {
      if (c >= channels) continue;
      Quad values;
#pragma unroll
      for (int pixel = 0; pixel < group; ++pixel) values.at[pixel] = float(from[c * stride + columns[pixel]]);
      add(total[c], weight, values);
    }
  }
#pragma unroll
  for (int c = 0; c < count; ++c) {
    if (c >= channels) continue;
    Packed packed;
#pragma unroll
    for (int pixel = 0; pixel < group; ++pixel) packed.at[pixel] = Storage(total[c].at[pixel]);
    *reinterpret_cast<Packed*>(out + c * stride) = packed;
  }
}

// The block's pixels in groups; the first of its quarters has the channels 0, 4, 8, ..., the next one 1, 5, 9, ...
__device__ void step_of_groups(const Storage* masks, const Storage* weights, int batch, int channels, int height,
                               int width, Storage* out) {
  constexpr int most = 6;  // channels at a time, 24 sums
  const int groups = blockDim.x / group, part = threadIdx.x / groups;
  const long long index = ((long long)blockIdx.x * groups + threadIdx.x % groups) * group;
  if (index >= (long long)batch * height * width) return;
  const Pixel p(index, height, width);
  const Storage* weight = weights + p.image * WSSS_COUNT * p.plane + p.here();
  const long long stride = (long long)group * p.plane;
  for (int first = part; first < channels; first += most * group) {
    const int left = (channels - first + group - 1) / group;
    const Storage* from = masks + (p.image * channels + first) * p.plane;
    Storage* to = out + (p.image * channels + first) * p.plane + p.here();
    if (left <= 2)
      step_of_group<2>(from, weight, stride, left, p, to);
    else
      step_of_group<most>(from, weight, stride, left, p, to);
  }
}
}  // namespace

// Five blocks a multiprocessor: without a bound the compiler takes some registers too many for the fifth.
extern "C" __global__ void __launch_bounds__(WSSS_BLOCK, 5)
    wsss_pairwise_step(const Storage* __restrict__ masks, const Storage* __restrict__ weights, int batch, int channels,
                       int height, int width, Storage* __restrict__ out) {
  if (width % group == 0 && blockDim.x % group == 0 && is_packed(masks) && is_packed(weights) && is_packed(out)) {
    step_of_groups(masks, weights, batch, channels, height, width, out);
    return;
  }
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
