"""The energy's CUDA program without a GPU: it compiles and assembles, and its code, on the CPU, is the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import (
    EnergyParameters,
    EnergyTerm,
    cuda_check,
    energy,
    energy_api,
    energy_cuda_form,
    energy_form,
    energy_ops,
    energy_reference,
)
from wsss_deploy.pairwise.cuda_source import compile_program
from wsss_deploy.pairwise.energy_cuda_source import ENERGY_KERNELS, energy_source

PARAMETERS = EnergyParameters(
    radius=3,
    terms=(EnergyTerm(weight=0.9, xy_sigma=6.0), EnergyTerm(weight=0.3), EnergyTerm(weight=0.1, xy_sigma=2.0)),
)
CHANNELS, WANTED = (3, 5, 0), (False, True, False)

# What g++ needs to take a CUDA program for C++, and a loop in place of the grid.
EMULATION = """
struct Index { unsigned x; };
static Index blockIdx, blockDim = {1}, threadIdx;
#define __global__
#define __device__
#define __constant__ static const
"""
GRID = """
extern "C" void run(const Real* l, const Real* r, const Real* s, const Real* d, const Real* f, int n, int h, int w,
                    Real* sums, Real* values, Real* gradients) {
  for (blockIdx.x = 0; blockIdx.x < unsigned(n * h * w) + 3; ++blockIdx.x) {
    wsss_pairwise_energy(l, r, s, d, f, n, h, w, sums, values);
    wsss_pairwise_energy_features(l, r, s, d, f, n, h, w, gradients);
  }
}
"""


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("channels", [CHANNELS, (0, 0, 0)])
def test_nvrtc_compiles_and_assembles_it(real, channels):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings with NVRTC")
    wanted = [count > 0 for count in channels]
    text = energy_source(PARAMETERS, 21, channels, wanted=wanted, real=real)
    # A real architecture makes NVRTC run its assembler: what comes is machine code.
    assert compile_program(text, "energy.cu", "sm_90").startswith(b"\x7fELF")
    entries = dict(re.findall(r"\.entry (\w+)\(([^)]*)\)", compile_program(text, "energy.cu").decode()))
    assert set(entries) == set(ENERGY_KERNELS)
    for name, outputs in zip(ENERGY_KERNELS, (2, 1), strict=True):
        kinds = re.findall(r"\.param \.(\w+)", entries[name])
        assert kinds == ["u64"] * 5 + ["u32"] * 3 + ["u64"] * outputs


@pytest.mark.parametrize("matrix", [None, [[0.0, 1, 2, 1], [1, 0, 1, 3], [2, 1, 0, 1], [1, 3, 1, 0]]])
def test_its_arithmetic_run_on_the_cpu_equals_the_reference(matrix, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = energy_source(PARAMETERS, 4, CHANNELS, wanted=WANTED, potts=matrix is None, real="double")
    (tmp_path / "program.cpp").write_text(EMULATION + source + GRID)
    library = tmp_path / "program.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", str(tmp_path / "program.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    program = ctypes.CDLL(str(library))

    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.random((2, 4, 7, 11)))
    features = torch.from_numpy(rng.standard_normal((2, 8, 7, 11)))
    gates = [torch.from_numpy((rng.random((2, 1, 7, 11)) > 0.2).astype(float)) for _ in range(2)]
    m = None if matrix is None else torch.tensor(matrix, dtype=torch.float64)
    maps = [features[:, :3], features[:, 3:], None]
    value, towards, grads = energy_reference.energy(p, *gates, m, maps, PARAMETERS, WANTED)

    right = p if m is None else torch.einsum("ck,nkhw->nchw", m, p).contiguous()
    sums, values, gradients = torch.empty_like(p), torch.empty_like(gates[0]), torch.zeros_like(features)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (p, right, *gates, features, sums, values, gradients)]
    program.run(*pointers[:5], 2, 7, 11, *pointers[5:])
    torch.testing.assert_close(values.sum(), value)
    torch.testing.assert_close(sums, towards)
    torch.testing.assert_close(gradients[:, 3:], grads[1])
    assert not gradients[:, :3].any()


MATRICES = {"potts": None, "symmetric": [[0, 1, 2], [1, 0, 3], [2, 3, 0]], "any": [[0, 1, 2], [3, 0, 1], [1, 1, 0]]}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("one_way", [False, True])
def test_launches_give_the_reference(matrix, one_way, driver):
    m = None if MATRICES[matrix] is None else torch.tensor(MATRICES[matrix], dtype=torch.float64)
    parameters = PARAMETERS.model_copy(update={"one_way": one_way})
    generator = torch.Generator().manual_seed(0)
    p, rgb, deep, s, d = (
        torch.rand(2, count, 7, 11, generator=generator, dtype=torch.float64) for count in (3, 3, 5, 1, 1)
    )
    p, found = p.softmax(dim=1), []
    for form in ("torch", "cuda"):
        given = [leaf.clone().requires_grad_() for leaf in (p, deep)]
        value, _, _ = energy_ops.pairwise_energy(
            given[0], s, d, m, [given[1], rgb], [1, 0, -1], [False, True, False], parameters.to_json(), form, 1
        )
        value.backward()
        found.append((value.detach(), given[0].grad, given[1].grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert [name for name, *_ in driver.launches] == ["run_energy", "run_energy_features"]
    for _, blocks, threads, stream in driver.launches:
        assert (blocks - 1) * threads < 2 * 7 * 11 <= blocks * threads
        assert stream == 7


def test_launches_in_single_precision_without_features(driver):
    p = torch.rand(1, 4, 6, 9).softmax(dim=1)
    ones, parameters = torch.ones(1, 1, 6, 9), EnergyParameters(radius=2, terms=(EnergyTerm(weight=1.0),))
    values = [
        energy_ops.pairwise_energy(p, ones, ones, None, [], [-1], [False], parameters.to_json(), form, 1)[:2]
        for form in ("torch", "cuda")
    ]
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_kernels_that_compute_something_else_are_not_offered(driver, monkeypatch):
    monkeypatch.setattr(cuda_check, "place_of", lambda _: torch.device("cpu"))
    assert energy_cuda_form.check(0) is None
    energy_cuda_form.check.cache_clear()
    launch = energy_cuda_form.launch
    monkeypatch.setattr(
        energy_cuda_form, "launch", lambda *given: (launch(*given), [out.add_(0.01) for out in given[-1]])
    )
    assert "differs" in energy_cuda_form.check(0)
    energy_cuda_form.check.cache_clear()
    monkeypatch.setattr(
        energy_cuda_form,
        "launch",
        lambda *given: (launch(*given), given[1].endswith("features") and given[-1][0].fill_(torch.nan)),
    )
    assert "nan" in energy_cuda_form.check(0)
    energy_cuda_form.check.cache_clear()
    monkeypatch.setattr(energy_cuda_form, "launch", lambda *given: [].pop())
    assert "IndexError" in energy_cuda_form.check(0)
    energy_cuda_form.check.cache_clear()
    monkeypatch.setattr(energy_cuda_form, "launch", launch)
    driver.refuse = 700
    assert "refuses" in energy_cuda_form.check(0)


def test_the_choice_on_a_cuda_device(monkeypatch):
    p = torch.rand(1, 2, 5, 4)
    with pytest.raises(UsageError, match="move or convert"):
        energy_form(p, 5, "cuda")

    def on_a_device(dtype=torch.float32):
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0), shape=p.shape)

    if not torch.cuda.is_available():
        assert energy_form(on_a_device(), 5).name == "torch"
        with pytest.raises(BackendError, match="of the energy"):
            energy_form(on_a_device(), 5, "cuda")
    monkeypatch.setattr(energy_api, "cuda_obstacle", lambda device, check: None)
    assert energy_form(on_a_device(), 50).name == "cuda", "any radius"
    assert energy_form(on_a_device(torch.float16), 5).name == "torch"
    with pytest.raises(UsageError, match="float16"):
        energy_form(on_a_device(torch.float16), 5, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(dtype):
    p, rgb, deep, s, d = (torch.rand(2, count, 41, 67, device="cuda", dtype=dtype) for count in (21, 3, 5, 1, 1))
    assert energy_form(p, 3).name == "cuda"
    p, found = p.softmax(dim=1), []
    for form in ("torch", "cuda"):
        given = [leaf.clone().requires_grad_() for leaf in (p, deep)]
        value = energy(given[0], [rgb, given[1], None], PARAMETERS, source=s, destination=d, form=form)
        value.backward()
        found.append((value.detach(), given[0].grad, given[1].grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
