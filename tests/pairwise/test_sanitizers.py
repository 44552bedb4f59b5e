"""The C++ under the address and undefined-behaviour sanitisers, in a program of its own (no Python to instrument)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "wsss_deploy" / "pairwise" / "csrc"
PROGRAM = r"""
#include "driver.h"
#include "energy.h"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
using namespace wsss;
template <class S> double all(Kind kind, int H, int W, int C, int G, int reach, int threads, int steps) {
  Plan plan{kind, {}, {}, {}, {{0.5, 0.1, 2, 3}}, 0.3, 0.01, 1, true, reach};
  for (int d : {1, reach})
    for (int k = 0; k < 9; ++k)
      if (k != 4) {
        plan.dy.push_back(d * (k / 3 - 1));
        plan.dx.push_back(d * (k % 3 - 1));
        plan.position.push_back(0.001);
      }
  const int K = plan.count(), N = 2;
  std::vector<S> guide(N * G * H * W), masks(N * C * H * W), weights(N * K * H * W), out(N * C * H * W);
  for (size_t i = 0; i < guide.size(); ++i) guide[i] = S(i * 37 % 11) / 11;
  for (size_t i = 0; i < masks.size(); ++i) masks[i] = S(i * 29 % 7) / 7;
  if (W > 5) { guide[3] = S(INFINITY); guide[7] = S(NAN); masks[5] = S(NAN); }
  double sum = 0;
  for (const char* isa : {"base", "avx2", "avx512"}) {
    const Kernels<S>* kernels = kernels_named<S>(isa);
    if (!kernels) continue;
    const Shape shape{N, C, G, H, W};
    affinity<S>(plan, *kernels, shape, guide.data(), weights.data(), threads);
    step<S>(plan, *kernels, shape, masks.data(), weights.data(), nullptr, 0, out.data(), threads);
    refine<S>(plan, *kernels, shape, masks.data(), guide.data(), masks.data(), 0.5, steps, out.data(), threads);
    if constexpr (sizeof(S) == 4) {
      const auto* small = kernels_named<S, Compact>(isa);
      if (small && kind != Kind::varm) {
        // Refused for the NaN where there is one, then of numbers that fit.
        const auto fits = [&](const std::vector<S>& m, const std::vector<S>& g) {
          return refine<S, Compact>(plan, *small, shape, m.data(), g.data(), nullptr, 0, steps, out.data(), threads);
        };
        std::vector<S> whole_masks = masks, whole_guide = guide;
        for (std::vector<S>* values : {&whole_masks, &whole_guide})
          for (S& value : *values)
            if (!std::isfinite(value)) value = S(0.5);
        if (fits(masks, whole_guide) != (W <= 5)) std::abort();
        if (kind == Kind::par && fits(whole_masks, guide) != (W <= 5)) std::abort();
        if (!fits(whole_masks, whole_guide)) std::abort();
      }
    }
    for (S value : out) sum += std::isfinite(value) ? double(value) : 0;
  }
  return sum;
}
template <class S> double pairs(int H, int W, int C, int G, int radius, int threads) {
  const int N = 2;
  const size_t plane = size_t(N) * H * W;
  std::vector<S> p(plane * C), right(p), map(plane * G), gate(plane, 1), sums(p), gradient(map);
  for (size_t i = 0; i < p.size(); ++i) p[i] = S(i * 29 % 7) / 7;
  for (size_t i = 0; i < map.size(); ++i) map[i] = S(i * 37 % 11) / 11;
  if (W > 5) { map[3] = S(INFINITY); map[7] = S(NAN); p[5] = S(NAN); gate[2] = 0; }
  double sum = 0;
  for (const char* isa : {"base", "avx2", "avx512"}) {
    const EnergyKernels<S>* kernels = energy_kernels_named<S>(isa);
    if (!kernels) continue;
    for (bool potts : {true, false}) {
      const EnergyPlan plan{radius, {{0.5, 0.1, 0, potts}, {0.5, 0, -1, false}, {1, 0, 1, true}}, potts};
      const EnergyArrays<S> arrays{N, C, H, W, p.data(), potts ? p.data() : right.data(),
        potts ? gate.data() : nullptr, potts ? gate.data() : nullptr,
        {{map.data(), G, gradient.data()}, {map.data(), G, gradient.data()}}, sums.data()};
      const double value = energy<S>(plan, *kernels, arrays, threads);
      sum += std::isfinite(value) ? value : 0;
    }
  }
  return sum;
}
int main() {
  double sum = 0;
  for (int threads : {1, 3})
    for (auto [h, w] : {std::pair{1, 1}, {3, 17}, {14, 33}, {2, 600}, {40, 1}})
      sum += pairs<float>(h, w, 25, 4, 5, threads) + pairs<double>(h, w, 2, 3, 32, threads);
  for (Kind kind : {Kind::par, Kind::varm, Kind::gaussian})
    for (int threads : {1, 3})
      for (auto [h, w] : {std::pair{1, 1}, {3, 17}, {20, 33}, {2, 600}})
        sum += all<float>(kind, h, w, 25, 4, 24, threads, 3) + all<double>(kind, h, w, 2, 1, 5, threads, 1);
  for (int threads : {1, 2, 5}) sum += all<float>(Kind::par, 97, 19, 3, 5, 2, threads, 7);
  std::printf("%g\n", sum);
}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_report_from_the_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DWSSS_X86"]
    sets = {
        "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "kernels_avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"],
    }
    objects = []
    for name in ("driver", "energy", "kernels_base", *sets):
        objects.append(str(tmp_path / f"{name}.o"))
        command = [compiler, *flags, *sets.get(name, []), "-c", str(SOURCE / f"{name}.cpp"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = str(tmp_path / "program")
    subprocess.run(
        [compiler, *flags, f"-I{SOURCE}", str(tmp_path / "program.cpp"), *objects, "-o", program, "-pthread"],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
