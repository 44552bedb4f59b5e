#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "arithmetic.h"
#include "team.h"

namespace wsss {
namespace {

constexpr int line_bytes = 64;

template <class S>
int round_up(int value, int unit) {
  return (value + unit - 1) / unit * unit;
}

// A packed image that owns its memory; `reach` + 1 columns either side can be read around any block.
template <class S>
struct Image : Packed<S> {
  Image(int channels, int height, int width, int reach, int lanes) {
    const int line = line_bytes / int(sizeof(S));
    this->channels = channels;
    this->height = height;
    this->width = width;
    this->left = round_up<S>(reach + 1, line);
    int lines = (this->left + round_up<S>(width, std::max(lanes, line)) + reach + 1 + line - 1) / line;
    lines += lines % 2 == 0;
    this->pitch = std::ptrdiff_t(lines) * line;
    memory = Buffer<S>(std::size_t(this->pitch) * std::size_t(channels) * std::size_t(height));
    this->data = memory.get();
  }

  // Edge values beside the row y, up to the pitch's end.
  void fill_left(int y) const {
    for (int c = 0; c < this->channels; ++c) {
      S* row = this->row(y, c);
      std::fill(row - this->left, row, row[0]);
    }
  }
  void fill_right(int y) const {
    for (int c = 0; c < this->channels; ++c) {
      S* row = this->row(y, c);
      std::fill(row + this->width, row - this->left + this->pitch, row[this->width - 1]);
    }
  }
  // Row y from a contiguous (channels, H, W) array by a kernel's `pack`, whose answer it gives.
  template <class From>
  bool pack(const Plan& plan, const From* from, int y, bool (*pack_row)(const Plan&, const From*, S*, int)) const {
    bool fits = true;
    for (int c = 0; c < this->channels; ++c)
      fits &= pack_row(plan, from + (std::ptrdiff_t(c) * this->height + y) * this->width, this->row(y, c), this->width);
    fill_left(y);
    fill_right(y);
    return fits;
  }
  RowTarget<S> target(int y) const { return {this->row(y, 0), this->pitch, int(this->pitch) - this->left}; }

  Buffer<S> memory;
};

// Images are worked through in strips of this many columns, so that the rows which a row's neighbours lie in stay in
// the cache until the next row needs them.
constexpr int strip_columns = 512;

// Bytes of the third-level cache; 8 MB where nobody tells. (sysconf adds up caches that a virtual machine cannot reach.)
std::ptrdiff_t cache_bytes() {
  static const std::ptrdiff_t found = [] {
    long kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    return std::ptrdiff_t(kilobytes > 0 ? kilobytes : 8192) << 10;
  }();
  return found;
}

// How many steps go over the image in one pass: as many as find weights and masks of the rows between the first and the
// last of them still in the cache, of which half is taken to be ours.
template <class S>
int steps_in_a_pass(const Plan& plan, Shape shape, int members, std::ptrdiff_t pitch) {
  const std::ptrdiff_t row = pitch * std::ptrdiff_t(sizeof(S)), reach = std::max(plan.reach, 1);
  const std::ptrdiff_t step = row * (reach * plan.count() + (2 * reach + 1) * shape.channels);
  const std::ptrdiff_t most = cache_bytes() / 2 / members / step;
  // Members' rows end `reach` rows earlier on both sides with every step.
  const std::ptrdiff_t room = members == 1 ? most : 1 + shape.height / members / (2 * reach);
  return int(std::clamp<std::ptrdiff_t>(std::min(most, room), 1, 1 << 20));
}

template <class S>
RowTarget<S> planar(S* out, int height, int width, int y) {
  return {out + std::ptrdiff_t(y) * width, std::ptrdiff_t(height) * width, width};
}

}  // namespace

template <class S>
void affinity(const Plan& plan, const Kernels<S>& kernels, Shape shape, const S* guide, S* weights, int threads) {
  const int height = shape.height, width = shape.width, lanes = kernels.lanes, count = plan.count();
  const std::ptrdiff_t plane = std::ptrdiff_t(height) * width;
  const int blocks = (width + lanes - 1) / lanes;
  const Image<S> packed(shape.guide_channels, height, width, plan.reach, lanes);
  const std::size_t block_size = std::size_t(count) * std::size_t(lanes);
  const std::size_t scratch_size = (1 + affinity_scratch) * block_size;
  const Buffer<S> scratch((block_size + scratch_size) * std::size_t(threads));
  run_team(threads, [&](Member member) {
    S* block_weights = scratch.get() + (block_size + scratch_size) * std::size_t(member.index);
    for (int n = 0; n < shape.batch; ++n) {
      for (int y = member.first(height); y < member.last(height); ++y)
        packed.pack(plan, guide + n * shape.guide_channels * plane, y, kernels.pack);
      member.meet();
      for (int y = member.first(height); y < member.last(height); ++y)
        for (int block = 0; block < blocks; ++block) {
          kernels.affinity(plan, packed, y, block, block + 1, block_weights, block_weights + block_size);
          const int x = block * lanes;
          const std::size_t bytes = sizeof(S) * std::size_t(std::min(lanes, width - x));
          S* to = weights + n * count * plane + std::ptrdiff_t(y) * width + x;
          for (int k = 0; k < count; ++k) std::memcpy(to + k * plane, block_weights + k * lanes, bytes);
        }
      member.meet();
    }
  });
}

template <class S>
void step(const Plan& plan, const Kernels<S>& kernels, Shape shape, const S* masks, const S* weights, const S* unary,
          double compatibility, S* out, int threads) {
  const int height = shape.height, width = shape.width, lanes = kernels.lanes, count = plan.count();
  const std::ptrdiff_t plane = std::ptrdiff_t(height) * width;
  const int blocks = (width + lanes - 1) / lanes, strip = strip_columns / lanes;
  const Image<S> packed(shape.channels, height, width, plan.reach, lanes);
  const std::size_t strip_size = std::size_t(count) * std::size_t(lanes) * std::size_t(std::min(strip, blocks));
  const Buffer<S> scratch(strip_size * std::size_t(threads));
  run_team(threads, [&](Member member) {
    S* own = scratch.get() + strip_size * std::size_t(member.index);
    for (int n = 0; n < shape.batch; ++n) {
      const std::ptrdiff_t start = std::ptrdiff_t(n) * shape.channels * plane;
      for (int y = member.first(height); y < member.last(height); ++y) packed.pack(plan, masks + start, y, kernels.pack);
      member.meet();
      for (int first = 0; first < blocks; first += strip) {
        const int last = std::min(first + strip, blocks);
        for (int y = member.first(height); y < member.last(height); ++y) {
          for (int k = 0; k < count; ++k)
            for (int block = first; block < last; ++block) {
              const int x = block * lanes, room = std::min(lanes, width - x);
              S* to = own + (std::ptrdiff_t(block - first) * count + k) * lanes;
              std::memcpy(to, weights + (std::ptrdiff_t(n) * count + k) * plane + std::ptrdiff_t(y) * width + x,
                          sizeof(S) * std::size_t(room));
              std::fill(to + room, to + lanes, S(0));
            }
          const RowTarget<S> target = planar(out + start, height, width, y);
          kernels.step(plan, packed, y, first, last, own, nullptr, target);
          if (unary)
            kernels.softmax(shape.channels, width, first, last, unary + start + std::ptrdiff_t(y) * width, plane,
                            compatibility, target);
        }
      }
      member.meet();
    }
  });
}

template <class S, class T>
bool refine(const Plan& given, const Kernels<S, T>& kernels, Shape shape, const S* masks, const S* guide, const S* unary,
            double compatibility, int iterations, S* out, int threads) {
  Plan plan = given;
  if (!std::is_same_v<S, T>) plan.levels = most_levels / float(most_growth(plan, iterations));
  const int height = shape.height, width = shape.width, lanes = kernels.lanes, count = plan.count();
  const std::ptrdiff_t plane = std::ptrdiff_t(height) * width;
  const std::ptrdiff_t size = shape.channels * plane;
  if (iterations == 0) {
    std::memcpy(out, masks, sizeof(S) * std::size_t(size) * std::size_t(shape.batch));
    return true;
  }
  const int blocks = (width + lanes - 1) / lanes, strip = strip_columns / lanes;
  const std::size_t block_size = block_values<S, T>(count, lanes);
  const Image<S> packed_guide(shape.guide_channels, height, width, plan.reach, lanes);
  const Image<Mask<T>> even(shape.channels, height, width, plan.reach, lanes);
  const Image<Mask<T>> odd(shape.channels, iterations > 1 ? height : 0, width, plan.reach, lanes);
  const Buffer<Weight<T>> weights(block_size * std::size_t(blocks) * std::size_t(height));
  const std::size_t scratch_size = std::size_t(1 + affinity_scratch) * std::size_t(count) * std::size_t(lanes);
  const Buffer<S> scratch(scratch_size * std::size_t(threads));
  // Two, as members leave where masks do not fit: nobody may hear of it before all have passed that place.
  std::atomic<bool> masks_fit = true, weights_fit = true;
  run_team(threads, [&](Member member) {
    S* own = scratch.get() + scratch_size * std::size_t(member.index);
    const int top = member.first(height), bottom = member.last(height);
    const int most = steps_in_a_pass<Mask<T>>(plan, shape, member.size, even.pitch);
    for (int n = 0; n < shape.batch; ++n) {
      for (int y = top; y < bottom; ++y) {
        packed_guide.pack(plan, guide + n * shape.guide_channels * plane, y, kernels_base<S>().pack);
        if (!even.pack(plan, masks + n * size, y, kernels.pack)) masks_fit = false;
      }
      member.meet();
      if (!masks_fit) return;
      // Step t of the blocks [first, last) of row y; `more`: the next row's come soon after.
      const auto advance = [&](int t, int y, int first, int last, bool more) {
        const Image<Mask<T>>&from = t % 2 ? odd : even, &to = t % 2 ? even : odd;
        const bool final = t + 1 == iterations;
        Weight<T>* w = weights.get() + block_size * (std::size_t(y) * std::size_t(blocks) + std::size_t(first));
        // The first step computes the weights that it uses; they are still in the cache.
        if (t == 0 && !kernels.affinity(plan, packed_guide, y, first, last, w, own)) weights_fit = false;
        const Weight<T>* next = t > 0 && more ? w + block_size * std::size_t(blocks) : nullptr;
        const auto softmax = [&](RowTarget<S> target) {
          if (unary)
            kernels.softmax(shape.channels, width, first, last, unary + n * size + std::ptrdiff_t(y) * width, plane,
                            compatibility, target);
        };
        if (final) {
          const RowTarget<S> target = planar(out + n * size, height, width, y);
          kernels.last_step(plan, from, y, first, last, w, next, target);
          return softmax(target);
        }
        kernels.step(plan, from, y, first, last, w, next, to.target(y));
        if constexpr (std::is_same_v<S, T>) softmax(to.target(y));
        if (first == 0) to.fill_left(y);
        if (last == blocks) to.fill_right(y);
      };
      for (int start = 0, group; start < iterations; start += group) {
        group = std::min(most, iterations - start);
        if (group == 1) {
          for (int first = 0; first < blocks; first += strip)
            for (int y = top; y < bottom; ++y) advance(start, y, first, std::min(first + strip, blocks), y + 1 < bottom);
          member.meet();
          continue;
        }
        // Several steps in one pass: each follows the one before it `reach` rows behind, when the rows that it needs
        // are there and those that it overwrites are not needed any more. Its rows end `reach` rows a step before
        // another member's begin.
        for (int front = top; front < bottom + (group - 1) * plan.reach; ++front)
          for (int t = 0; t < group; ++t) {
            const int lag = t * plan.reach, y = front - lag;
            const int low = member.index == 0 ? top : top + lag;
            const int high = member.index + 1 == member.size ? bottom : bottom - lag;
            if (low <= y && y < high) advance(start + t, y, 0, blocks, y + 1 < high);
          }
        member.meet();
        // What is left are the rows about the borders between members, which all share, step by step.
        for (int t = 1; t < group && member.size > 1; ++t) {
          const int lag = t * plan.reach, rows = (member.size - 1) * 2 * lag;
          for (int row = member.first(rows); row < member.last(rows); ++row) {
            const int border = Member{row / (2 * lag) + 1, member.size, nullptr}.first(height);
            advance(start + t, border - lag + row % (2 * lag), 0, blocks, false);
          }
          member.meet();
        }
      }
    }
  });
  return masks_fit && weights_fit;
}

template <class S, class T>
const Kernels<S, T>* kernels_named(const char* name) {
  if (!std::strcmp(name, "auto")) name = best_instruction_set();
  if constexpr (std::is_same_v<S, T>)
    if (!std::strcmp(name, "base")) return &kernels_base<S, T>();
#ifdef WSSS_X86
  // Every processor with AVX2 converts float16 (F16C), which not every compiler can be asked about.
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &kernels_avx2<S, T>();
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return &kernels_avx512<S, T>();
#endif
  return nullptr;
}

double most_growth(const Plan& plan, int iterations) {
  double sum = 1;
  if (plan.kind == Kind::par)
    for (const double weight : plan.position) sum += weight;
  return std::max(1.0, std::pow(sum * plan.scale, iterations));
}

// The most that rounding can come to. Levels: half of one for the masks given and for those after every step but the last,
// multiplied by all steps that follow. Weights: what was measured at most, in proportion to the masks.
double most_rounding(const Plan& plan, int iterations) {
  constexpr double of_weights = 2e-4;
  double steps = 0;
  for (int left = 1; left <= iterations; ++left) steps += most_growth(plan, left);
  return most_growth(plan, iterations) * (steps / (2.0 * most_levels) + of_weights);
}

bool fits_compact(const Plan& plan, int iterations) {
  const bool convex = plan.kind == Kind::par || (plan.kind == Kind::gaussian && plan.normalise);
  // 100 steps whose weights add up to 1, or 45 by PAR's published factor of 1.01 a step.
  return convex && iterations <= 100 && most_rounding(plan, iterations) < 1e-3;
}

const char* best_instruction_set() {
  for (const char* name : {"avx512", "avx2"})
    if (kernels_named<float, float>(name)) return name;
  return "base";
}

#define WSSS_INSTANTIATE(S, T)                                                                                 \
  template bool refine<S, T>(const Plan&, const Kernels<S, T>&, Shape, const S*, const S*, const S*, double, int, S*, \
                             int);                                                                             \
  template const Kernels<S, T>* kernels_named<S, T>(const char*);
WSSS_INSTANTIATE(float, float)
WSSS_INSTANTIATE(double, double)
WSSS_INSTANTIATE(float, Compact)
#define WSSS_INSTANTIATE_PARTS(S)                                                                          \
  template void affinity<S>(const Plan&, const Kernels<S>&, Shape, const S*, S*, int);                     \
  template void step<S>(const Plan&, const Kernels<S>&, Shape, const S*, const S*, const S*, double, S*, int);
WSSS_INSTANTIATE_PARTS(float)
WSSS_INSTANTIATE_PARTS(double)

}  // namespace wsss
