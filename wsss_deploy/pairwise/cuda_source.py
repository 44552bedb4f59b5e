"""The CUDA form's source for given parameters, and its PTX by NVRTC (cuda-bindings); neither needs a GPU.

Kernels: `wsss_pairwise_affinity(guide, N, G, H, W, weights)`, `wsss_pairwise_step(masks, weights, N, C, H, W, out)`,
`wsss_pairwise_mean_field_step(masks, weights, unary, N, C, H, W, out)`; sizes are int32, as many threads as pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from wsss_deploy.errors import BackendError
from wsss_deploy.pairwise import ptx_cache
from wsss_deploy.pairwise.cuda_launch import BLOCK
from wsss_deploy.pairwise.parameters import PairwiseParameters

_KINDS = ("par", "varm", "gaussian")
KERNELS = ("wsss_pairwise_affinity", "wsss_pairwise_step", "wsss_pairwise_mean_field_step")


def definitions(parameters: PairwiseParameters, storage: str = "float") -> str:
    """The preprocessor lines that make `pairwise.cu` a program for these parameters.

    Args:
        parameters: What is compiled in.
        storage: Type of the arrays, "float" or "__half"; sums are in float.
    """
    position = [parameters.second * beta for beta in parameters.position_weights()]
    terms = [
        "{"
        + _numbers((t.weight, *(0 if s is None else s**-2 for s in (t.sigma_xy, t.sigma_rgb, t.sigma_features))))
        + "}"
        for t in parameters.terms
    ]
    aligned, near, rest = _grouped(parameters.offsets)
    values = {
        "KIND": _KINDS.index(parameters.kind),
        "COUNT": len(parameters.offsets),
        "DY": ", ".join(str(dy) for dy, _ in parameters.offsets),
        "DX": ", ".join(str(dx) for _, dx in parameters.offsets),
        "POSITION": _numbers(position),
        "TERMS": ", ".join(terms),
        "TERM_COUNT": len(terms),
        "BANDWIDTH": _numbers([parameters.contrast]),
        "SECOND": _numbers([parameters.second]),
        "SCALE": _numbers([parameters.scale]),
        "NORMALISE": int(parameters.normalise),
        "COMPATIBILITY": _numbers([parameters.mean_field.compatibility if parameters.mean_field else 0.0]),
        "STORAGE": storage,
        "BLOCK": BLOCK,
    }
    values["NEAR_START"] = ", ".join(str(sum(map(len, near[:distance]))) for distance in range(4))
    for name, listed in (("ALIGNED", aligned), ("NEAR", [row for rows in near for row in rows]), ("REST", rest)):
        values[f"{name}_COUNT"] = len(listed)
        # An array of no length is none: one more than there are.
        values[name] = ", ".join([*listed, "{}"])
    lines = ["#include <cuda_fp16.h>"] if storage == "__half" else []
    return "\n".join([*lines, *(f"#define WSSS_{name} {value}" for name, value in values.items()), ""])


def _grouped(offsets: Sequence[tuple[int, int]]) -> tuple[list[str], list[list[str]], list[str]]:
    """How a step takes its neighbours for four pixels at once, see `pairwise.cu`.

    Returns:
        Numbers of those that are whole groups of four away, rows of those 1, 2 and 3 away, numbers of all others.
    """
    number = {offset: k for k, offset in enumerate(offsets)}
    near: list[list[str]] = []
    taken = set()
    for distance in (1, 2, 3):
        near.append([])
        for dy in sorted({dy for dy, _ in offsets}):
            left, middle, right = ((dy, dx) for dx in (-distance, 0, distance))
            if left in number and right in number:
                between = number[middle] if middle in number and middle not in taken else -1
                near[-1].append(f"{{{dy}, {number[left]}, {between}, {number[right]}}}")
                taken |= {left, middle, right}
    others = [offset for offset in offsets if offset not in taken]
    aligned = [str(number[offset]) for offset in others if offset[1] % 4 == 0]
    return aligned, near, [str(number[offset]) for offset in others if offset[1] % 4 != 0]


def source(parameters: PairwiseParameters, storage: str = "float") -> str:
    """The whole program in one text, header included."""
    folder = files("wsss_deploy.pairwise") / "csrc"
    header = (folder / "arithmetic.h").read_text().replace("#pragma once", "")
    program = (folder / "pairwise.cu").read_text().replace('#include "arithmetic.h"', header)
    return definitions(parameters, storage) + program


@functools.lru_cache(maxsize=16)
def ptx(parameters: PairwiseParameters, storage: str = "float", architecture: str = "compute_80") -> bytes:
    """The program's PTX, or its machine code.

    Args:
        parameters: What is compiled in.
        storage: Type of the arrays, "float" or "__half".
        architecture: See `compile_program`.

    Raises:
        BackendError: cuda-bindings or NVRTC are not installed, or the program does not compile.
    """
    return compile_program(source(parameters, storage), "pairwise.cu", architecture)


def compile_program(text: str, name: str, architecture: str = "compute_80") -> bytes:
    """A compiled program, from the disk where it was compiled before.

    Args:
        text: CUDA C++.
        name: For messages.
        architecture: "compute_80" and the like give PTX, which drivers that are no older than the compiler compile for
            this GPU and newer ones; "sm_90" and the like give machine code for GPUs of that kind alone, which any
            driver of the compiler's major version loads.

    Raises:
        BackendError: As `ptx`.
    """
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise BackendError(f"the CUDA form needs NVRTC ({error}); pip install 'cuda-bindings[all]'") from error
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device"]
    try:
        version = ".".join(map(str, _all_checked(nvrtc.nvrtcVersion())))
    except (RuntimeError, BackendError) as error:
        raise BackendError(f"NVRTC cannot be loaded ({error}); pip install 'cuda-bindings[all]'") from error
    machine = architecture.startswith("sm_")
    known = ptx_cache.key(text, *options, version, "cubin" if machine else "ptx text")
    kept = ptx_cache.read(known)
    if kept is not None:
        return kept
    headers = find_nvidia_header_directory("cudart")
    if headers:
        options.append(f"--include-path={headers}")
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        # NVRTC writes into the bytes object. Only a log that says something is asked for: an empty one has size 1,
        # and a one-byte object is shared by the whole interpreter, which would find every space to be a NUL.
        log = b" " * (_checked(nvrtc.nvrtcGetProgramLogSize(program)) + 1)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"NVRTC does not compile {name} ({status.name}): {log.decode()[:2000]}")
    size, read = ("nvrtcGetCUBINSize", "nvrtcGetCUBIN") if machine else ("nvrtcGetPTXSize", "nvrtcGetPTX")
    result: bytes = b" " * _checked(getattr(nvrtc, size)(program))
    getattr(nvrtc, read)(program, result)
    if not machine:
        result = result.rstrip(b"\0")  # a C string's end, which assemblers refuse in a file
    nvrtc.nvrtcDestroyProgram(program)
    ptx_cache.write(known, result)
    return result


def _checked(answer: tuple[Any, Any]) -> Any:
    (value,) = _all_checked(answer)
    return value


def _all_checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if getattr(status, "name", "") != "NVRTC_SUCCESS":
        raise BackendError(f"NVRTC fails ({status})")
    return tuple(values)


def _numbers(values: Iterable[float]) -> str:
    # Below the normal range of float: zero, as in the kernels' own exponential.
    return ", ".join(f"{value if abs(value) > 1.2e-38 else 0.0:.9e}f" for value in values)
