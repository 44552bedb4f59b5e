// The energy's part of the Python module wsss_deploy.pairwise._cpu.
#include "energy_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "energy.h"

namespace nb = nanobind;
using namespace wsss;

namespace {

template <class S>
using Array = nb::ndarray<S, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Terms = std::vector<std::tuple<double, double, int, bool>>;

void expect(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

template <class A, class B>
bool same_pixels(const A& a, const B& b) {
  return a.shape(0) == b.shape(0) && a.shape(2) == b.shape(2) && a.shape(3) == b.shape(3);
}

template <class S>
double run(int radius, const Terms& terms, bool potts, const Array<const S>& left, const Array<const S>& right,
           const std::optional<Array<const S>>& source, const std::optional<Array<const S>>& destination,
           const std::vector<Array<const S>>& features, const Array<S>& sums,
           const std::vector<std::optional<Array<S>>>& gradients, int threads, const std::string& isa) {
  expect(radius >= 1, "the radius is at least 1");
  const int longest = int(std::min<std::size_t>(std::max(left.shape(2), left.shape(3)), max_energy_radius + 2));
  expect(std::min(radius, longest - 1) <= max_energy_radius, "the window reaches more than 32 pixels");
  expect(same_pixels(left, right) && same_pixels(left, sums) && left.shape(1) == right.shape(1) &&
             left.shape(1) == sums.shape(1),
         "left, right and sums must be of one shape (N, C, H, W)");
  expect(source.has_value() == destination.has_value(), "give both gates or none");
  for (const auto& gate : {source, destination})
    expect(!gate || (same_pixels(left, *gate) && gate->shape(1) == 1), "gates must be (N, 1, H, W)");
  expect(features.size() == gradients.size(), "give a gradient or None for each feature");
  expect(left.size() < (std::size_t(1) << 31) && left.shape(0) * left.shape(2) < (std::size_t(1) << 31),
         "the arrays hold 2^31 values or more; split the batch");
  EnergyArrays<S> arrays{int(left.shape(0)), int(left.shape(1)), int(left.shape(2)), int(left.shape(3)),
                         left.data(),        right.data(),       nullptr,            nullptr,
                         {},                 sums.data()};
  if (source) {
    arrays.source = source->data();
    arrays.destination = destination->data();
  }
  for (std::size_t i = 0; i < features.size(); ++i) {
    expect(same_pixels(left, features[i]) && features[i].shape(1) < 65536, "features must be (N, G, H, W)");
    expect(!gradients[i] || (same_pixels(left, *gradients[i]) && gradients[i]->shape(1) == features[i].shape(1)),
           "gradients must have their features' shape");
    arrays.features.push_back(
        {features[i].data(), int(features[i].shape(1)), gradients[i] ? gradients[i]->data() : nullptr});
  }
  EnergyPlan plan{radius, {}, potts};
  for (const auto& [weight, xy, feature, wanted] : terms) {
    expect(feature < int(features.size()), "a term names a feature that is not there");
    expect(!wanted || (feature >= 0 && gradients[std::size_t(feature)]), "a wanted gradient has no array");
    plan.terms.push_back({weight, xy, feature, wanted});
  }
  const EnergyKernels<S>* kernels = energy_kernels_named<S>(isa.c_str());
  if (!kernels) throw nb::value_error(("this processor or build has no instruction set '" + isa + "'").c_str());
  if (left.size() == 0) return 0;
  nb::gil_scoped_release release;
  return energy<S>(plan, *kernels, arrays, std::max(1, std::min({threads, arrays.batch * arrays.height, 256})));
}

template <class S>
void bind(nb::module_& module) {
  module.def("energy", run<S>, nb::arg("radius"), nb::arg("terms"), nb::arg("potts"), nb::arg("left").noconvert(),
             nb::arg("right").noconvert(), nb::arg("source").none().noconvert(),
             nb::arg("destination").none().noconvert(), nb::arg("features").noconvert(), nb::arg("sums").noconvert(),
             nb::arg("gradients").noconvert(), nb::arg("threads"), nb::arg("isa") = "auto");
}

}  // namespace

void bind_energy(nb::module_& module) {
  bind<float>(module);
  bind<double>(module);
}
