"""The CUDA form: the compiled program's kernels, launched through the driver API on torch's current stream.

One launch for the affinity and one a step, no workspace, nothing is synchronised: after a first call with the same
parameters it can be captured in a CUDA graph. Arrays are float32 or float16, sums float32. Before it is offered, the
form has to reproduce the torch form on this very device (`check`).

**Not run yet on a GPU**; see docs/pairwise.md for what has been tested without one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wsss_deploy.errors import BackendError
from wsss_deploy.pairwise import cuda_source
from wsss_deploy.pairwise.parameters import PairwiseParameters

if TYPE_CHECKING:
    import torch

BLOCK = 128
STORAGE = {"float32": "float", "float16": "__half"}
#: PTX for this runs on everything newer; an older device gets its own.
ARCHITECTURE = 80


def affinity(parameters: PairwiseParameters, guide: torch.Tensor, weights: torch.Tensor) -> None:
    """Write the weights (N, K, H, W) of a guide (N, G, H, W); both contiguous, on one CUDA device."""
    _launch(parameters, "wsss_pairwise_affinity", [guide], guide, weights)


def step(
    parameters: PairwiseParameters,
    masks: torch.Tensor,
    weights: torch.Tensor,
    unary: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write one step's result (N, C, H, W); all contiguous, `out` none of the inputs."""
    if unary is None:
        _launch(parameters, "wsss_pairwise_step", [masks, weights], masks, out)
    else:
        _launch(parameters, "wsss_pairwise_mean_field_step", [masks, weights, unary], masks, out)


def refine(
    parameters: PairwiseParameters,
    masks: torch.Tensor,
    guide: torch.Tensor,
    unary: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the refined masks of the guide's size: an affinity and all steps, with one buffer besides the weights."""
    weights = guide.new_empty(guide.shape[0], len(parameters.offsets), *guide.shape[2:])
    affinity(parameters, guide, weights)
    if parameters.iterations == 0:
        out.copy_(masks)
        return
    # The last step writes to `out`, those before it to and fro.
    buffers = [out, out.new_empty(out.shape)] if parameters.iterations > 1 else [out]
    source = masks
    for remaining in range(parameters.iterations, 0, -1):
        target = buffers[(remaining - 1) % len(buffers)]
        step(parameters, source, weights, unary, target)
        source = target


@functools.cache
def check(device: int) -> str | None:
    """Why the form cannot be used on a CUDA device, or None if it can: it then equals the torch form there.

    Args:
        device: Number of the device.
    """
    import torch

    from wsss_deploy.pairwise import reference

    parameters = PairwiseParameters(dilations=(1, 3), iterations=2)
    try:
        generator = torch.Generator().manual_seed(0)
        place = torch.device("cuda", device)
        masks, guide = (torch.rand(2, count, 13, 37, generator=generator).to(place) for count in (5, 3))
        out = torch.empty_like(masks)
        refine(parameters, masks, guide, None, out)
        difference = float((out - reference.refine(masks, guide, parameters)).abs().max())
    except (BackendError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None if difference < 1e-4 else f"its result differs from torch's by {difference:.1e} on this device"


def _launch(
    parameters: PairwiseParameters,
    kernel: str,
    inputs: Sequence[torch.Tensor],
    sized: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Launch a kernel on the current stream of the tensors' device: one thread a pixel.

    Args:
        parameters: What the program was compiled for.
        kernel: A name of `cuda_source.KERNELS`.
        inputs: Its inputs, in the kernel's order.
        sized: Whose shape is given to it.
        out: Its output.
    """
    import torch

    for tensor in (*inputs, out):
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.device) == (out.dtype, out.device)
    if out.numel() == 0:
        return
    count, channels, height, width = sized.shape
    device = out.device.index or 0
    values = [item.data_ptr() for item in inputs] + [count, channels, height, width, out.data_ptr()]
    types = [ctypes.c_void_p] * len(inputs) + [ctypes.c_int] * 4 + [ctypes.c_void_p]
    blocks = -(-count * height * width // BLOCK)
    stream = torch.cuda.current_stream(out.device).cuda_stream
    driver = _driver()
    # A thread of the caller's may have no current context yet; torch itself uses the device's primary one.
    _checked(driver.cuCtxPushCurrent(_context(device)))
    try:
        function = _function(parameters, STORAGE[str(out.dtype).removeprefix("torch.")], device, kernel)
        given = (tuple(values), tuple(types))
        _checked(driver.cuLaunchKernel(function, blocks, 1, 1, BLOCK, 1, 1, 0, stream, given, 0))
    finally:
        driver.cuCtxPopCurrent()


@functools.cache
def _context(device: int) -> Any:
    """The device's primary context, kept for good."""
    driver = _driver()
    _checked(driver.cuInit(0))
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@functools.lru_cache(maxsize=64)
def _function(parameters: PairwiseParameters, storage: str, device: int, kernel: str) -> Any:
    return _checked(_driver().cuModuleGetFunction(_module(parameters, storage, device), kernel.encode()))


# Without a limit: a module that fell out of it would stay loaded all the same.
@functools.cache
def _module(parameters: PairwiseParameters, storage: str, device: int) -> Any:
    """The program, loaded into the current context, which is the device's."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    code = cuda_source.ptx(parameters, storage, f"compute_{min(10 * major + minor, ARCHITECTURE)}")
    return _checked(_driver().cuModuleLoadData(code + b"\0"))


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"the CUDA form needs cuda-bindings ({error}); pip install 'cuda-bindings[all]'") from error
    return driver


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        name = getattr(status, "name", status)
        raise BackendError(
            f"the CUDA driver refuses the pairwise kernels ({name}); use form 'torch', or update the driver"
        )
    return values[0] if values else None
