"""Compiled programs launched through the driver API (cuda-bindings), on tensors or on addresses.

Nothing is synchronised: after a first call with the same program a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wsss_deploy.errors import BackendError, UsageError

if TYPE_CHECKING:
    import torch

BLOCK = 128
#: PTX for this is what a GPU that the compiler does not know yet gets.
KNOWN = 80


class Program(Hashable, Protocol):
    """What can be compiled; equal programs are loaded once a device."""

    def ptx(self, architecture: str) -> bytes:
        """The code for an architecture, see `cuda_source.compile_program`."""


class Place(NamedTuple):
    """Where kernels run.

    Attributes:
        device: Number of the device; its primary context is used.
        stream: `CUstream`.
        capability: The device's compute capability, major and minor.
    """

    device: int
    stream: int
    capability: tuple[int, int]


def launch(
    program: Program, kernel: str, inputs: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
) -> None:
    """Launch a kernel on the current stream of the tensors' device: one thread a pixel.

    Args:
        program: Holds the kernel.
        kernel: Its name.
        inputs: Its first arguments; contiguous, on one CUDA device and of one type, like the outputs.
        sizes: Its int32 arguments after them: batch, any others, height, width.
        outputs: Its last arguments.

    Raises:
        UsageError: A tensor is fake, as in torch.export: it has no memory, and a kernel would write to address 0.
        BackendError: cuda-bindings or NVRTC are missing, the program does not compile, or the driver refuses it.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    first = outputs[0]
    for tensor in (*inputs, *outputs):
        if isinstance(tensor, FakeTensor):
            raise UsageError(
                f"kernel {kernel} was to run on a fake tensor of shape {tuple(tensor.shape)}, which has no data; call "
                "the operator (torch.ops.wsss, wsss_deploy.pairwise), whose fake kernel gives the shape"
            )
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.device) == (first.dtype, first.device)
    if first.numel() == 0:
        return
    device = first.device.index or 0
    stream = torch.cuda.current_stream(first.device).cuda_stream
    place = Place(device, stream, torch.cuda.get_device_capability(device))
    launch_at(place, program, kernel, [i.data_ptr() for i in inputs], sizes, [o.data_ptr() for o in outputs])


def launch_at(
    place: Place, program: Program, kernel: str, inputs: Sequence[int], sizes: Sequence[int], outputs: Sequence[int]
) -> None:
    """Launch a kernel on addresses of the device's memory: one thread a pixel, of which there is at least one.

    Args:
        place: Device and stream.
        program: As in `launch`.
        kernel: As in `launch`.
        inputs: Addresses of contiguous arrays.
        sizes: As in `launch`.
        outputs: Addresses of contiguous arrays.

    Raises:
        BackendError: As `launch`.
    """
    types: list[Any] = [ctypes.c_void_p] * len(inputs) + [ctypes.c_int] * len(sizes)
    types += [ctypes.c_void_p] * len(outputs)
    blocks = -(-sizes[0] * sizes[-2] * sizes[-1] // BLOCK)
    architecture = 10 * place.capability[0] + place.capability[1]
    driver = _driver()
    # A thread of the caller's may have no current context yet; torch itself uses the device's primary one.
    _checked(driver.cuCtxPushCurrent(_context(place.device)))
    try:
        function = _function(program, place.device, architecture, kernel)
        given = ((*inputs, *sizes, *outputs), tuple(types))
        _checked(driver.cuLaunchKernel(function, blocks, 1, 1, BLOCK, 1, 1, 0, place.stream, given, 0))
    finally:
        driver.cuCtxPopCurrent()


@functools.cache
def _context(device: int) -> Any:
    """The device's primary context, kept for good."""
    driver = _driver()
    _checked(driver.cuInit(0))
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@functools.lru_cache(maxsize=64)
def _function(program: Program, device: int, architecture: int, kernel: str) -> Any:
    return _checked(_driver().cuModuleGetFunction(_module(program, device, architecture), kernel.encode()))


# Without a limit: a module that fell out of it would stay loaded all the same.
@functools.cache
def _module(program: Program, device: int, architecture: int) -> Any:
    """The program, loaded into the current context, which is the device's.

    Machine code where the compiler knows the GPU: a driver that is older than the compiler refuses its PTX.
    """
    try:
        code = program.ptx(f"sm_{architecture}")
    except BackendError:
        if architecture <= KNOWN:
            raise
        code = program.ptx(f"compute_{KNOWN}")
    return _checked(_driver().cuModuleLoadData(code + b"\0"))


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"CUDA kernels need cuda-bindings ({error}); pip install 'cuda-bindings[all]'") from error
    return driver


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        name = getattr(status, "name", status)
        raise BackendError(
            f"the CUDA driver refuses the kernels ({name}); update it, or refine without them (form 'torch', "
            "or the CPU)"
        )
    return values[0] if values else None
