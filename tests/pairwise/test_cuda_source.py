"""The CUDA program without a GPU: it compiles and assembles, and its code, run on the CPU, gives the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from wsss_deploy.backends.device_mask import KERNEL as MASK_KERNEL
from wsss_deploy.backends.device_mask import mask_source
from wsss_deploy.pairwise import PairwiseParameters, numpy_form
from wsss_deploy.pairwise.cuda_guide import KERNEL, guide_source
from wsss_deploy.pairwise.cuda_source import KERNELS, compile_program, ptx, source

# What g++ needs to take a CUDA program for C++, and a loop in place of the grid.
EMULATION = """
struct Index { unsigned x; };
static Index blockIdx, blockDim = {1}, threadIdx;
#define __global__
#define __device__
#define __constant__ static const
#define __launch_bounds__(...)
"""
GRID = """
extern "C" void affinity(const float* g, int n, int c, int h, int w, float* out) {
  for (blockIdx.x = 0; blockIdx.x < unsigned(n * h * w) + 3; ++blockIdx.x) wsss_pairwise_affinity(g, n, c, h, w, out);
}
extern "C" void step(const float* m, const float* a, const float* u, int n, int c, int h, int w, float* out) {
  for (blockIdx.x = 0; blockIdx.x < unsigned(n * h * w) + 3; ++blockIdx.x)
    if (u) wsss_pairwise_mean_field_step(m, a, u, n, c, h, w, out);
    else wsss_pairwise_step(m, a, n, c, h, w, out);
}
"""


@pytest.fixture
def nvrtc():
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings with NVRTC")


@pytest.mark.parametrize("storage", ["float", "__half"])
def test_nvrtc_compiles_and_assembles_it(case, storage, nvrtc):
    # A real architecture makes NVRTC run its assembler: what comes is machine code.
    assert ptx(case, storage, "sm_90").startswith(b"\x7fELF")
    if storage != "float":
        return
    text = ptx(case, storage).decode()
    assert "ld.global.nc.v4" in text, "a step loads four values at once"
    assert bytearray(b" ")[0] == 32  # NVRTC writes into bytes objects; the interpreter's shared ones are not its own
    entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", text)
    assert {name for name, _ in entries} == set(KERNELS)
    for name, arguments in entries:
        kinds = re.findall(r"\.param \.(\w+)", arguments)
        pointers = {"wsss_pairwise_affinity": 1, "wsss_pairwise_step": 2, "wsss_pairwise_mean_field_step": 3}[name]
        # TensorRT's order: inputs, int32 sizes, output.
        assert kinds == ["u64"] * pointers + ["u32"] * 4 + ["u64"]


def registers(code, folder, kernel="wsss_pairwise_step"):
    """Registers and bytes of stack of a thread of a kernel."""
    spec = find_spec("triton")
    tools = sorted(Path(spec.submodule_search_locations[0]).glob("backends/nvidia/bin/cuobjdump")) if spec else []
    if not tools:
        pytest.skip("needs cuobjdump, which triton brings along")
    (folder / "program.cubin").write_bytes(code)
    told = subprocess.run(
        [str(tools[0]), "-res-usage", str(folder / "program.cubin")], check=True, capture_output=True, text=True
    ).stdout
    return tuple(map(int, re.search(kernel + r":\s+REG:(\d+) STACK:(\d+)", told).groups()))


def test_five_blocks_of_the_step_fit_a_multiprocessor(nvrtc, tmp_path):
    """65536 registers for 5 blocks of 128 threads; without the bound one block less would fit."""
    text = source(PairwiseParameters())
    most = 65536 // (5 * 128)
    used, stack = registers(compile_program(text, "pairwise.cu", "sm_90"), tmp_path)
    assert used <= most
    assert stack <= 64, "next to nothing is spilled"
    unbound = text.replace("__launch_bounds__(WSSS_BLOCK, 5)", "")
    assert unbound != text
    assert registers(compile_program(unbound, "pairwise.cu", "sm_90"), tmp_path)[0] > most


def test_nvrtc_compiles_the_masks(nvrtc, tmp_path):
    binary = compile_program(mask_source(), "best_class.cu", "sm_90")
    used, stack = registers(binary, tmp_path, MASK_KERNEL)
    assert used <= 64
    assert stack == 0, "nothing is spilled"
    text = compile_program(mask_source(), "best_class.cu").decode()
    ((name, arguments),) = re.findall(r"\.entry (\w+)\(([^)]*)\)", text)
    assert name == MASK_KERNEL
    assert re.findall(r"\.param \.(\w+)", arguments) == ["u64", *["u32"] * 6, "u64"]


@pytest.mark.parametrize("kind", ["rgb", "opponent"])
def test_nvrtc_compiles_the_guide(kind, nvrtc):
    assert compile_program(guide_source(kind), "guide.cu", "sm_90").startswith(b"\x7fELF")
    text = compile_program(guide_source(kind), "guide.cu").decode()
    ((name, arguments),) = re.findall(r"\.entry (\w+)\(([^)]*)\)", text)
    assert name == KERNEL
    assert re.findall(r"\.param \.(\w+)", arguments) == ["u64", "u32", "u32", "u32", "u64"]


def test_its_arithmetic_run_on_the_cpu_equals_the_reference(case, scene, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (tmp_path / "program.cpp").write_text(EMULATION + source(case) + GRID)
    library = tmp_path / "program.so"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        str(tmp_path / "program.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    program = ctypes.CDLL(str(library))
    data = scene(classes=11, height=9, width=13, dtype=np.float32)
    unary = numpy_form.unary_of(data.masks, case)

    def pointer(array):
        return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

    weights = np.empty((2, len(case.offsets), 9, 13), np.float32)
    program.affinity(pointer(data.guide), 2, 4, 9, 13, pointer(weights))
    np.testing.assert_allclose(weights, numpy_form.affinity(data.guide, case), rtol=2e-4, atol=1e-6)
    out = np.empty_like(data.masks)
    program.step(pointer(data.masks), pointer(weights), pointer(unary), 2, 11, 9, 13, pointer(out))
    np.testing.assert_allclose(out, numpy_form.step(data.masks, weights, case, unary), rtol=2e-5, atol=1e-6)
