// The Python module wsss_deploy.pairwise._cpu. Arrays of numpy, torch and others enter without a copy (DLPack).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "driver.h"
#include "energy_bindings.h"

namespace nb = nanobind;
using namespace wsss;

namespace {

template <class S>
using Array = nb::ndarray<S, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Offsets = std::vector<std::tuple<int, int>>;
using Terms = std::vector<std::tuple<double, double, double, double>>;

Plan make_plan(int kind, const Offsets& offsets, const std::vector<double>& position, const Terms& terms,
               double bandwidth, double second, double scale, bool normalise) {
  if (kind < 0 || kind > 2) throw nb::value_error("kind is 0 (par), 1 (varm) or 2 (gaussian)");
  if (offsets.size() < 2 || offsets.size() > std::size_t(max_neighbours))
    throw nb::value_error("2 to 4224 offsets can be used");
  Plan plan{Kind(kind), {}, {}, position, {}, bandwidth, second, scale, normalise, 0};
  for (const auto& [dy, dx] : offsets) {
    if (std::abs(dy) > 1024 || std::abs(dx) > 1024) throw nb::value_error("offsets reach at most 1024 pixels");
    plan.dy.push_back(dy);
    plan.dx.push_back(dx);
    plan.reach = std::max({plan.reach, std::abs(dy), std::abs(dx)});
  }
  for (const auto& [weight, xy, rgb, features] : terms) plan.terms.push_back({weight, xy, rgb, features});
  if (plan.kind == Kind::par && position.size() != offsets.size())
    throw nb::value_error("kind par needs one position weight per offset");
  return plan;
}

template <class S>
const Kernels<S>& kernels_for(const std::string& name) {
  const Kernels<S>* kernels = kernels_named<S>(name.c_str());
  if (!kernels) throw nb::value_error(("this processor or build has no instruction set '" + name + "'").c_str());
  return *kernels;
}

void expect(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

template <class A>
int size(const A& array, int axis) {
  expect(array.shape(std::size_t(axis)) < (std::size_t(1) << 24), "a side of an array is above 2^24");
  return int(array.shape(std::size_t(axis)));
}

template <class A, class B>
bool same(const A& a, const B& b, std::initializer_list<int> axes) {
  return std::all_of(axes.begin(), axes.end(), [&](int i) { return a.shape(std::size_t(i)) == b.shape(std::size_t(i)); });
}

int team_size(int threads, int height) { return std::max(1, std::min({threads, height, 256})); }

template <class A>
bool empty(const A& array) {
  return array.size() == 0;
}

template <class S>
void bind(nb::module_& module) {
  module.def(
      "affinity",
      [](const Plan& plan, Array<const S> guide, Array<S> weights, int threads, const std::string& isa) {
        expect(same(guide, weights, {0, 2, 3}) && size(weights, 1) == plan.count(),
               "weights must be (N, K, H, W) for a guide of (N, G, H, W)");
        const Shape shape{size(guide, 0), 0, size(guide, 1), size(guide, 2), size(guide, 3)};
        const Kernels<S>& kernels = kernels_for<S>(isa);
        if (empty(weights)) return;
        expect(!empty(guide), "the guide has no channels");
        nb::gil_scoped_release release;
        affinity<S>(plan, kernels, shape, guide.data(), weights.data(), team_size(threads, shape.height));
      },
      nb::arg("plan"), nb::arg("guide").noconvert(), nb::arg("weights").noconvert(), nb::arg("threads"),
      nb::arg("isa") = "auto");
  module.def(
      "step",
      [](const Plan& plan, Array<const S> masks, Array<const S> weights, std::optional<Array<const S>> unary,
         double compatibility, Array<S> out, int threads, const std::string& isa) {
        expect(same(masks, weights, {0, 2, 3}) && size(weights, 1) == plan.count() && same(masks, out, {0, 1, 2, 3}) &&
                   (!unary || same(masks, *unary, {0, 1, 2, 3})),
               "masks, unary and out must be (N, C, H, W), weights (N, K, H, W)");
        const Shape shape{size(masks, 0), size(masks, 1), 0, size(masks, 2), size(masks, 3)};
        const Kernels<S>& kernels = kernels_for<S>(isa);
        if (empty(out)) return;
        nb::gil_scoped_release release;
        step<S>(plan, kernels, shape, masks.data(), weights.data(), unary ? unary->data() : nullptr, compatibility,
                out.data(), team_size(threads, shape.height));
      },
      nb::arg("plan"), nb::arg("masks").noconvert(), nb::arg("weights").noconvert(), nb::arg("unary").none().noconvert(),
      nb::arg("compatibility"), nb::arg("out").noconvert(), nb::arg("threads"), nb::arg("isa") = "auto");
  module.def(
      "refine",
      [](const Plan& plan, Array<const S> masks, Array<const S> guide, std::optional<Array<const S>> unary,
         double compatibility, int iterations, Array<S> out, int threads, const std::string& isa, bool compact) {
        expect(same(masks, guide, {0, 2, 3}) && same(masks, out, {0, 1, 2, 3}) &&
                   (!unary || same(masks, *unary, {0, 1, 2, 3})),
               "masks, unary and out must be (N, C, H, W), the guide (N, G, H, W)");
        expect(iterations >= 0, "iterations are at least 0");
        const Shape shape{size(masks, 0), size(masks, 1), size(guide, 1), size(masks, 2), size(masks, 3)};
        const Kernels<S>& kernels = kernels_for<S>(isa);
        if (empty(out)) return;
        expect(!empty(guide), "the guide has no channels");
        const int team = team_size(threads, shape.height);
        nb::gil_scoped_release release;
        if constexpr (std::is_same_v<S, float>)
          if (compact && !unary && fits_compact(plan, iterations))
            if (const auto* small = kernels_named<S, Compact>(isa.c_str()))
              if (refine<S, Compact>(plan, *small, shape, masks.data(), guide.data(), nullptr, 0, iterations, out.data(),
                                     team))
                return;
        refine<S, S>(plan, kernels, shape, masks.data(), guide.data(), unary ? unary->data() : nullptr, compatibility,
                     iterations, out.data(), team);
      },
      nb::arg("plan"), nb::arg("masks").noconvert(), nb::arg("guide").noconvert(), nb::arg("unary").none().noconvert(),
      nb::arg("compatibility"), nb::arg("iterations"), nb::arg("out").noconvert(), nb::arg("threads"),
      nb::arg("isa") = "auto", nb::arg("compact") = false);
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "Compiled CPU form of the pairwise operator; use wsss_deploy.pairwise.";
  nb::class_<Plan>(module, "Plan");
  module.def("make_plan", make_plan, nb::arg("kind"), nb::arg("offsets"), nb::arg("position"), nb::arg("terms"),
             nb::arg("bandwidth"), nb::arg("second"), nb::arg("scale"), nb::arg("normalise"));
  module.def("instruction_set", [] { return std::string(best_instruction_set()); },
             "The instruction set that calls use by default: avx512, avx2 or base.");
  bind<float>(module);
  bind<double>(module);
  bind_energy(module);
}
