"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The folder with real data, vectors and weights: WSSS_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("WSSS_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs the shared folder (real data, vectors, weights): set WSSS_SHARED to its path")
    return folder


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from more, and other tests may run beside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_card():
    from wsss_deploy.card import Architecture, ModelCard, default_palette
    from wsss_deploy.networks import encoder_preprocessing

    classes = ("background", "circle", "square", "star")
    return ModelCard(
        name="tiny",
        classes=classes,
        palette=default_palette(len(classes)),
        architecture=Architecture(encoder="test_vit", decoder_width=16),
        preprocessing=encoder_preprocessing("test_vit", {}),
    )


@pytest.fixture(scope="session")
def tiny_network(tiny_card):
    import torch

    from wsss_deploy.networks import build_network

    torch.manual_seed(0)
    return build_network(tiny_card.architecture, len(tiny_card.classes)).eval()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_card, tiny_network) -> Path:
    from wsss_deploy.artifact import save_model

    path = tmp_path_factory.mktemp("tiny") / "model.pt"
    save_model(path, tiny_card, tiny_network.state_dict())
    return path


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model) -> Path:
    from export.onnx_graph import export_onnx

    return export_onnx(tiny_model, tiny_model.parent)


EMULATION = """
struct Index { unsigned x; };
static Index blockIdx, blockDim, threadIdx;
#define __global__
#define __device__
#define __constant__ static const
#define __launch_bounds__(...)
"""
LOOP = """
#define RUN(call) blockDim.x = threads; \\
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) \\
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) call
typedef void* P;
#ifdef WSSS_KIND
typedef WSSS_STORAGE* F;
extern "C" void run_affinity(unsigned blocks, unsigned threads, P g, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_affinity(F(g), n, c, h, w, F(o)));
}
extern "C" void run_step(unsigned blocks, unsigned threads, P m, P a, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_step(F(m), F(a), n, c, h, w, F(o)));
}
extern "C" void run_mean_field_step(unsigned blocks, unsigned threads, P m, P a, P u, int n, int c, int h, int w, P o) {
  RUN(wsss_pairwise_mean_field_step(F(m), F(a), F(u), n, c, h, w, F(o)));
}
#elif defined(WSSS_OPPONENT)
extern "C" void run_guide(unsigned blocks, unsigned threads, P i, int n, int h, int w, P g) {
  RUN(wsss_pairwise_guide((unsigned char*)i, n, h, w, (float*)g));
}
#elif defined(WSSS_BEST_CLASS)
extern "C" void run_best_class(unsigned blocks, unsigned threads, P s, int n, int c, int h, int w, int r, int k, P m) {
  RUN(wsss_best_class((float*)s, n, c, h, w, r, k, (unsigned char*)m));
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


load_library = ctypes.CDLL  # tests of TensorRT put a stand-in into its place


class Contexts:
    """What of cuda.bindings.driver makes a context current; contexts nest."""

    def __init__(self):
        self.local = threading.local()

    @property
    def contexts(self):
        """Of this thread."""
        return self.local.__dict__.setdefault("contexts", [])

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


class Driver(Contexts):
    """Kernels are functions of a shared library."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.launches, self.refuse, self.lock = [], None, threading.Lock()
        (folder / "cuda_fp16.h").write_text("typedef _Float16 __half;\n")

    def cuModuleLoadData(self, image):
        assert self.contexts, "a module is loaded into the current context"
        assert image.endswith(b"\0")
        # The same program comes in many tests; the folder is the whole session's.
        name = f"program{hashlib.sha256(image).hexdigest()[:16]}"
        if (self.folder / f"{name}.so").exists():
            return 0, load_library(str(self.folder / f"{name}.so"))
        (self.folder / f"{name}.cpp").write_bytes(EMULATION.encode() + image[:-1] + LOOP.encode())
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-I.", f"{name}.cpp", "-o", f"{name}.so"]
        # A GPU refuses vector loads from other addresses, which this CPU would not.
        command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        subprocess.run(command, check=True, cwd=self.folder)
        return 0, load_library(str(self.folder / f"{name}.so"))

    def cuModuleGetFunction(self, module, name):
        return 0, getattr(module, name.decode().replace("wsss_pairwise", "run").replace("wsss_best", "run_best"))

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        assert self.contexts == ["context 0"]
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        if self.refuse is not None:
            return (self.refuse,)
        values, types = arguments
        with self.lock:  # the grid's indices are globals of the library
            function.argtypes = [ctypes.c_uint, ctypes.c_uint, *types]
            function(gx, bx, *values)
            self.launches.append((function.__name__, gx, bx, stream))
        return (0,)


@pytest.fixture
def contexts():
    """A stand-in for the part of the driver that makes contexts current."""
    return Contexts()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def driver(monkeypatch, programs):
    """A stand-in for the driver that runs the kernels' code, compiled as C++, on CPU tensors."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    import torch

    from wsss_deploy.pairwise import cuda_form, cuda_launch, cuda_source, energy_cuda_form

    stand_in = Driver(programs)
    monkeypatch.setattr(cuda_launch, "_driver", lambda: stand_in)
    monkeypatch.setattr(
        cuda_source, "ptx", lambda parameters, storage, _: cuda_source.source(parameters, storage).encode()
    )
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
