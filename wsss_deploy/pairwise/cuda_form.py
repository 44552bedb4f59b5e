"""The CUDA form: the compiled program's kernels, launched through the driver API.

One launch for the affinity and one a step, no workspace; `cuda_launch` says how. Arrays are float32 or float16, sums
float32. Tensors are worked on in torch's current stream; before that is offered, the form has to reproduce the torch
form on this very device (`check`). `refine_at` works on addresses, for runtimes without torch.

**Not run yet on a GPU**; see docs/pairwise.md for what has been tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsss_deploy.pairwise import cuda_source
from wsss_deploy.pairwise.cuda_check import DeviceCheck, Finding
from wsss_deploy.pairwise.cuda_launch import Place, launch, launch_at
from wsss_deploy.pairwise.parameters import GaussianTerm, MeanField, PairwiseParameters

if TYPE_CHECKING:
    import torch

STORAGE = {"float32": "float", "float16": "__half"}
_AFFINITY, _STEP, _MEAN_FIELD_STEP = cuda_source.KERNELS


def affinity(parameters: PairwiseParameters, guide: torch.Tensor, weights: torch.Tensor) -> None:
    """Write the weights (N, K, H, W) of a guide (N, G, H, W); both contiguous, on one CUDA device."""
    _launch(parameters, _AFFINITY, [guide], guide, weights)


def step(
    parameters: PairwiseParameters,
    masks: torch.Tensor,
    weights: torch.Tensor,
    unary: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write one step's result (N, C, H, W); all contiguous, `out` none of the inputs."""
    if unary is None:
        _launch(parameters, _STEP, [masks, weights], masks, out)
    else:
        _launch(parameters, _MEAN_FIELD_STEP, [masks, weights, unary], masks, out)


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


def refine_at(
    place: Place,
    parameters: PairwiseParameters,
    shape: tuple[int, int, int, int],
    guide: tuple[int, int],
    masks: int,
    weights: int,
    spare: int,
) -> int:
    """Refine float32 masks on the device: an affinity and all steps, to and fro between two arrays.

    Args:
        place: Device and stream.
        parameters: Without a mean field, which would need the masks' logarithms.
        shape: (N, C, H, W) of the masks, none of them 0.
        guide: Channels and address of the guide, (N, G, H, W).
        masks: Address; overwritten if there are two steps or more.
        weights: Address of room for (N, K, H, W).
        spare: Address of room for the masks.

    Returns:
        Address of the refined masks: `masks` or `spare`.

    Raises:
        BackendError: See `cuda_launch.launch`.
    """
    if parameters.iterations == 0:
        return masks
    batch, channels, *size = shape
    program = _Program(parameters, "float")
    launch_at(place, program, _AFFINITY, [guide[1]], [batch, guide[0], *size], [weights])
    for _ in range(parameters.iterations):
        launch_at(place, program, _STEP, [masks, weights], [batch, channels, *size], [spare])
        masks, spare = spare, masks
    return masks


def _compare(place: torch.device) -> Iterator[Finding]:
    """Small problems on which every kernel, both storages, and rows of whole groups of four and others are run."""
    import torch

    from wsss_deploy.pairwise import reference

    # Offsets of each of the three ways in which a step takes four pixels at once.
    par = PairwiseParameters(dilations=(1, 4, 6), iterations=2)
    varm = PairwiseParameters(kind="varm", dilations=(1, 4, 6), iterations=2, second_weight=0.5)
    terms = (GaussianTerm(weight=0.8, sigma_xy=3.0, sigma_rgb=0.5),)
    mean_field = PairwiseParameters(kind="gaussian", radius=1, iterations=2, terms=terms, mean_field=MeanField())
    # Each is a program to be compiled, so storages and kinds go together.
    for parameters, dtype, limit in (
        (par, torch.float32, 1e-4),
        (varm, torch.float16, 1e-2),
        (mean_field, torch.float32, 1e-4),
    ):
        for width in (37, 36):
            generator = torch.Generator().manual_seed(0)
            masks, guide = (
                torch.rand(2, count, 13, width, generator=generator, dtype=torch.float32, device="cpu").to(place, dtype)
                for count in (5, 3)
            )
            out = torch.empty_like(masks)
            refine(parameters, masks, guide, reference.unary_of(masks, parameters), out)
            difference = (out.float() - reference.refine(masks, guide, parameters).float()).abs().max()
            kind = str(dtype).removeprefix("torch.")
            yield f"{parameters.kind}, {kind}, {width} pixels wide", float(difference), limit


#: Why the form cannot be used on a CUDA device of a number, None if it can.
check = DeviceCheck(_compare)


@dataclass(frozen=True)
class _Program:
    """`pairwise.cu` with its parameters compiled in."""

    parameters: PairwiseParameters
    storage: str

    def ptx(self, architecture: str) -> bytes:
        return cuda_source.ptx(self.parameters, self.storage, architecture)


def _launch(
    parameters: PairwiseParameters,
    kernel: str,
    inputs: Sequence[torch.Tensor],
    sized: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Launch a kernel of `cuda_source.KERNELS`; `sized` is what its four sizes are of."""
    program = _Program(parameters, STORAGE[str(out.dtype).removeprefix("torch.")])
    launch(program, kernel, inputs, tuple(sized.shape), [out])
