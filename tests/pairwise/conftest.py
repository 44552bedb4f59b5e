from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsss_deploy.pairwise import (
    GaussianTerm,
    MeanField,
    PairwiseParameters,
    cuda_form,
    cuda_launch,
    cuda_source,
    energy_cuda_form,
    forms,
    native,
)

TERMS = (GaussianTerm(weight=0.9, sigma_xy=6.0, sigma_rgb=0.1), GaussianTerm(weight=0.2, sigma_features=0.5))
CASES = {
    "par": PairwiseParameters(dilations=(1, 2, 4), iterations=3),
    "par-official": PairwiseParameters(iterations=2),
    "varm": PairwiseParameters(kind="varm", dilations=(1, 3), iterations=3, normalise=True),
    "gaussian": PairwiseParameters(kind="gaussian", radius=2, terms=TERMS, iterations=2),
    "gaussian-normalised": PairwiseParameters(
        kind="gaussian", dilations=(1, 5), terms=TERMS, iterations=3, normalise=True
    ),
    "mean-field": PairwiseParameters(
        kind="gaussian", radius=3, terms=TERMS, iterations=3, mean_field=MeanField(compatibility=0.7)
    ),
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def cases():
    return CASES


@pytest.fixture
def compiled() -> None:
    form = forms()[0]
    # Without a compiler the package installs without it, and so it does where the sources do not compile.
    if not form.available and (shutil.which("g++") or shutil.which("clang++")):
        pytest.fail(f"there is a C++ compiler, but {form.reason}")
    if not form.available:
        pytest.skip(form.reason)


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request, compiled) -> str:
    tiny = np.zeros((1, 1, 2, 2), np.float32)
    try:
        native.affinity(PairwiseParameters(dilations=(1,)), tiny, np.empty((1, 8, 2, 2), np.float32), 1, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def scene():
    """Random guide with flat parts, and probabilities: scene(N, C, G, H, W, dtype)."""

    def make(batch=2, classes=3, channels=4, height=19, width=37, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        guide = rng.random((batch, channels, height, width))
        guide[..., : height // 2, : width // 2] = 0.25
        scores = rng.random((batch, classes, height, width)) ** 4
        masks = scores / scores.sum(1, keepdims=True)
        return SimpleNamespace(guide=guide.astype(dtype), masks=masks.astype(dtype))

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny; torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EMULATION = """
struct Index { unsigned x; };
static Index blockIdx, blockDim, threadIdx;
#define __global__
#define __device__
#define __constant__ static const
"""
LOOP = """
#define RUN(call) blockDim.x = threads; \\
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) \\
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call
typedef void* P;
#ifdef WSSS_KIND
typedef float* F;
extern "C" void run_affinity(unsigned blocks, unsigned threads, P g, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_affinity(F(g), n, c, h, w, F(o)));
}
extern "C" void run_step(unsigned blocks, unsigned threads, P m, P a, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_step(F(m), F(a), n, c, h, w, F(o)));
}
extern "C" void run_mean_field_step(unsigned blocks, unsigned threads, P m, P a, P u, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_mean_field_step(F(m), F(a), F(u), n, c, h, w, F(o)));
}
#else
typedef Real* R;
extern "C" void run_energy(unsigned blocks, unsigned threads, P l, P r, P s, P d, P f, int n, int h, int w, P o, P v) {
  RUN(wsss_pairwise_energy(R(l), R(r), R(s), R(d), R(f), n, h, w, R(o), R(v)));
}
extern "C" void run_energy_features(unsigned blocks, unsigned threads, P l, P r, P s, P d, P f, int n, int h, int w,
                                    P g) {
  RUN(wsss_pairwise_energy_features(R(l), R(r), R(s), R(d), R(f), n, h, w, R(g)));
}
#endif
"""


class Driver:
    """Answers as cuda.bindings.driver does; contexts nest, kernels are functions of a shared library."""

    def __init__(self, folder):
        self.folder, self.names = folder, itertools.count()
        self.contexts, self.launches, self.refuse = [], [], None

    def cuInit(self, flags):
        return (0,)

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, f"context {device}"

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.pop()

    def cuModuleLoadData(self, image):
        assert self.contexts, "a module is loaded into the current context"
        assert image.endswith(b"\0")
        name = f"program{next(self.names)}"
        (self.folder / f"{name}.cpp").write_bytes(EMULATION.encode() + image[:-1] + LOOP.encode())
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"{name}.cpp", "-o", f"{name}.so"]
        subprocess.run(command, check=True, cwd=self.folder)
        return 0, ctypes.CDLL(str(self.folder / f"{name}.so"))

    def cuModuleGetFunction(self, module, name):
        return 0, getattr(module, name.decode().replace("wsss_pairwise", "run"))

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        assert self.contexts == ["context 0"]
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        if self.refuse is not None:
            return (self.refuse,)
        values, types = arguments
        function.argtypes = [ctypes.c_uint, ctypes.c_uint, *types]
        function(gx, bx, *values)
        self.launches.append((function.__name__, gx, bx, stream))
        return (0,)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A stand-in for the driver that runs the kernels' code, compiled as C++, on CPU tensors."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    stand_in = Driver(tmp_path)
    monkeypatch.setattr(cuda_launch, "_driver", lambda: stand_in)
    monkeypatch.setattr(cuda_source, "ptx", lambda parameters, storage, _: cuda_source.source(parameters).encode())
    monkeypatch.setattr(cuda_source, "compile_program", lambda text, *_: text.encode())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    caches = (cuda_launch._context, cuda_launch._function, cuda_launch._module, cuda_form.check)
    caches += (energy_cuda_form.check,)
    for cache in caches:
        cache.cache_clear()
    yield stand_in
    for cache in caches:
        cache.cache_clear()
    assert stand_in.contexts == []
