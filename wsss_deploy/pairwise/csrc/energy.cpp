#include "energy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "driver.h"
#include "team.h"

namespace wsss {
namespace {

// Images are worked through in strips of this many columns, so that both rings stay in the second-level cache.
constexpr int strip_columns = 256;
constexpr int line_bytes = 64;

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
int round_down(int value, int unit) { return -round_up(-value, unit); }

// An odd number of cache lines: channels at one x then fall into different cache sets.
template <class S>
std::ptrdiff_t odd_pitch(int columns) {
  const int line = line_bytes / int(sizeof(S));
  const int lines = round_up(columns, line) / line;
  return std::ptrdiff_t(lines | 1) * line;
}

// What is the same for all rows, strips and threads.
template <class S>
struct Layout {
  Layout(const EnergyPlan& plan, const EnergyArrays<S>& arrays, int lanes)
      : reach_y(std::min(plan.radius, arrays.height - 1)),
        reach_x(std::min(plan.radius, arrays.width - 1)),
        wanted(int(std::count_if(plan.terms.begin(), plan.terms.end(), [](auto& term) { return term.wanted; }))) {
    const int strips = (arrays.width + strip_columns - 1) / strip_columns;
    columns = round_up((arrays.width + strips - 1) / strips, lanes);
    for (int y = 0; y <= reach_y; ++y)
      for (int x = y == 0 ? 1 : -reach_x; x <= reach_x; ++x) {
        dy.push_back(y);
        dx.push_back(x);
        for (const EnergyTerm& term : plan.terms)
          factors.push_back(S(term.weight * std::exp(-0.5 * term.xy * (x * x + y * y))));
      }
    int channel = 2;
    for (const EnergyTerm& term : plan.terms) {
      const int channels = term.feature < 0 ? 0 : arrays.features[std::size_t(term.feature)].channels;
      first_channel.push_back(channel);
      term_channels.push_back(channels);
      channel += channels;
    }
    right = channel;
    left = arrays.left == arrays.right ? right : right + arrays.channels;
    const int half = round_up(reach_x, lanes);
    maps.channels = left + arrays.channels;
    maps.slots = 2 * reach_y + 2;
    maps.margin = 2 * half;
    maps.pitch = odd_pitch<S>(columns + 4 * half);
    weights.channels = int(dy.size()) * (1 + wanted);
    weights.slots = reach_y + 2;
    weights.margin = half;
    weights.pitch = odd_pitch<S>(columns + 2 * half);
  }
  int reach_y, reach_x, wanted, columns = 0, right = 0, left = 0;
  std::vector<int> dy, dx, first_channel, term_channels;
  std::vector<S> factors;
  EnergyRing<S> maps, weights;  // without memory
};

// One thread's rows of one image, strip by strip.
template <class S>
class Worker {
 public:
  Worker(const EnergyPlan& plan, const EnergyKernels<S>& kernels, const EnergyArrays<S>& arrays,
         const Layout<S>& layout)
      : plan_(plan), kernels_(kernels), arrays_(arrays), layout_(layout), memory_(layout.maps.size() + layout.weights.size()),
        neighbours_(std::size_t(2 * layout.reach_y + 2) * std::size_t(2 * layout.reach_x + 1)) {
    strip_ = {&plan, layout.dy.data(), layout.dx.data(), layout.factors.data(), layout.first_channel.data(),
              layout.term_channels.data(), int(layout.dy.size()), layout.reach_y, layout.reach_x, arrays.channels, arrays.height, layout.right,
              layout.left, layout.maps, layout.weights, neighbours_.data()};
    strip_.maps.data = memory_.get();
    strip_.weights.data = memory_.get() + layout.maps.size();
  }

  // Rows [top, bottom) of image n; values[y] becomes the row's part of the energy, twice.
  void rows(int n, int top, int bottom, double* values) {
    std::fill(values + top, values + bottom, 0.0);
    for (int start = 0; start < arrays_.width; start += layout_.columns) {
      std::fill_n(memory_.get(), layout_.maps.size() + layout_.weights.size(), S(0));
      const int columns = std::min(layout_.columns, arrays_.width - start);
      const int first = round_down(std::max(-layout_.reach_x, -start), kernels_.lanes);
      const int last = round_up(std::min(columns + layout_.reach_x, arrays_.width - start), kernels_.lanes);
      int packed = std::max(0, top - layout_.reach_y);
      const auto prepare = [&](int y) {
        for (; packed <= std::min(y + layout_.reach_y, arrays_.height - 1); ++packed) pack(n, packed, start);
        // Above the first own row only the weights that reach into it are needed; the neighbour thread has the rest.
        kernels_.weights(strip_, y, first, last, std::max(0, top - y));
      };
      for (int y = packed; y < top; ++y) prepare(y);
      for (int y = top; y < bottom; y += 2) {
        const int rows = std::min(2, bottom - y);
        for (int row = 0; row < rows; ++row) prepare(y + row);
        kernels_.sums(strip_, y, rows, target(arrays_.sums, arrays_.channels, n, y, start, columns), values + y);
        for (int row = 0; row < rows; ++row) feature_gradients(n, y + row, start, columns);
      }
    }
  }

 private:
  void feature_gradients(int n, int y, int start, int columns) const {
    for (int term = 0, plane = 1; term < int(plan_.terms.size()); ++term) {
      if (!plan_.terms[std::size_t(term)].wanted) continue;
      const EnergyFeature<S>& feature = arrays_.features[std::size_t(plan_.terms[std::size_t(term)].feature)];
      kernels_.feature_gradient(strip_, y, term, plane++,
                                target(feature.gradient, feature.channels, n, y, start, columns));
    }
  }

  std::ptrdiff_t plane() const { return std::ptrdiff_t(arrays_.height) * arrays_.width; }

  EnergyTarget<S> target(S* data, int channels, int n, int y, int start, int columns) const {
    return {data + n * channels * plane() + std::ptrdiff_t(y) * arrays_.width + start, plane(),
            arrays_.width, columns};
  }

  // Row y of all maps into the ring, for the strip that starts at column `start`; zeros outside the image.
  void pack(int n, int y, int start) const {
    const int left = std::max(-layout_.maps.margin, -start);
    const int right = std::min(layout_.columns + layout_.maps.margin, arrays_.width - start);
    const std::size_t count = std::size_t(right - left);
    const auto copy = [&](const S* from, int channels, int channel) {
      for (int c = 0; c < channels; ++c)
        std::memcpy(strip_.maps.at(y, channel + c) + left,
                    from + (std::ptrdiff_t(n) * channels + c) * plane() + std::ptrdiff_t(y) * arrays_.width + start + left,
                    count * sizeof(S));
    };
    if (arrays_.source) {
      copy(arrays_.source, 1, 0);
      copy(arrays_.destination, 1, 1);
    } else {
      std::fill_n(strip_.maps.at(y, 0) + left, count, S(1));
      std::fill_n(strip_.maps.at(y, 1) + left, count, S(0.5));
    }
    for (std::size_t t = 0; t < plan_.terms.size(); ++t)
      if (layout_.term_channels[t])
        copy(arrays_.features[std::size_t(plan_.terms[t].feature)].data, layout_.term_channels[t], layout_.first_channel[t]);
    copy(arrays_.right, arrays_.channels, layout_.right);
    if (layout_.left != layout_.right) copy(arrays_.left, arrays_.channels, layout_.left);
  }

  const EnergyPlan& plan_;
  const EnergyKernels<S>& kernels_;
  const EnergyArrays<S>& arrays_;
  const Layout<S>& layout_;
  Buffer<S> memory_;
  std::vector<EnergyNeighbour<S>> neighbours_;
  EnergyStrip<S> strip_;
};

}  // namespace

template <class S>
double energy(const EnergyPlan& plan, const EnergyKernels<S>& kernels, const EnergyArrays<S>& arrays, int threads) {
  const Layout<S> layout(plan, arrays, kernels.lanes);
  std::vector<Worker<S>> workers;
  workers.reserve(std::size_t(threads));
  for (int i = 0; i < threads; ++i) workers.emplace_back(plan, kernels, arrays, layout);
  // Two rows at a time, always the same two: how sums are ordered does not depend on the split.
  const int half = (arrays.height + 1) / 2, pairs = arrays.batch * half;
  std::vector<double> values(std::size_t(arrays.batch) * std::size_t(arrays.height));
  run_team(threads, [&](Member member) {
    // Rows of all images in one row: a batch of small images splits between images where it can.
    for (int at = member.first(pairs); at < member.last(pairs);) {
      const int n = at / half, first = at % half, last = std::min(half, first + member.last(pairs) - at);
      workers[std::size_t(member.index)].rows(n, 2 * first, std::min(2 * last, arrays.height),
                                              values.data() + std::ptrdiff_t(n) * arrays.height);
      at += last - first;
    }
  });
  double total = 0;
  for (const double value : values) total += value;
  return total / 2;
}

template <class S>
const EnergyKernels<S>* energy_kernels_named(const char* name) {
  const Kernels<S>* same = kernels_named<S>(name);
  if (!same) return nullptr;
#ifdef WSSS_X86
  if (same == &kernels_avx512<S>()) return &energy_kernels_avx512<S>();
  if (same == &kernels_avx2<S>()) return &energy_kernels_avx2<S>();
#endif
  return &energy_kernels_base<S>();
}

#define WSSS_INSTANTIATE(S)                                                                                \
  template double energy<S>(const EnergyPlan&, const EnergyKernels<S>&, const EnergyArrays<S>&, int);       \
  template const EnergyKernels<S>* energy_kernels_named<S>(const char*);
WSSS_INSTANTIATE(float)
WSSS_INSTANTIATE(double)

}  // namespace wsss
