"""The pair energy's CUDA form: value and gradients by one kernel, features' gradients by a second where wanted.

`cuda_launch` says how kernels are launched. Arrays are float32 or float64; pixels' parts of the energy are added up in
float64. Before it is offered, the form has to reproduce the torch form on this very device (`check`).

**Not run yet on a GPU**; see docs/pairwise.md for what has been tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wsss_deploy.pairwise import cuda_source
from wsss_deploy.pairwise.cuda_check import DeviceCheck, Finding
from wsss_deploy.pairwise.cuda_launch import launch
from wsss_deploy.pairwise.energy_cuda_source import ENERGY_KERNELS, energy_source
from wsss_deploy.pairwise.energy_parameters import EnergyParameters, EnergyTerm

if TYPE_CHECKING:
    import torch

Real = Literal["float", "double"]
REALS: dict[str, Real] = {"float32": "float", "float64": "double"}


@dataclass(frozen=True)
class _Program:
    """`energy.cu` for given parameters and numbers of channels."""

    parameters: EnergyParameters
    classes: int
    channels: tuple[int, ...]
    wanted: tuple[bool, ...]
    potts: bool
    real: Real

    def ptx(self, architecture: str) -> bytes:
        text = energy_source(
            self.parameters, self.classes, self.channels, wanted=self.wanted, potts=self.potts, real=self.real
        )
        return cuda_source.compile_program(text, "energy.cu", architecture)


def energy(
    left: torch.Tensor,
    right: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor] | None,
    sums: torch.Tensor,
    potts: bool,
    parameters: EnergyParameters,
    features: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    feature_of_term: Sequence[int],
    wanted: Sequence[bool],
) -> torch.Tensor:
    """Write neighbour sums and the wanted features' gradients; see `native.energy`, whose arguments these are.

    Returns:
        The energy, a float64 scalar on the device.

    Raises:
        BackendError: See `cuda_launch.launch`.
    """
    import torch

    batch, classes, height, width = right.shape
    channels = tuple(0 if index < 0 else features[index].shape[1] for index in feature_of_term)
    maps = [features[index] for index in feature_of_term if index >= 0]
    # A program without features takes the address of something.
    stacked = torch.cat(maps, dim=1) if maps else right.new_empty(batch, 1, 1, 1)
    if gates is None:
        # A pair's gate is d_i s_j + d_j s_i, which has to be 1.
        ones = torch.ones_like(right[:, :1])
        gates = ones, ones / 2
    source, destination = (gate.contiguous() for gate in gates)
    program = _Program(
        parameters, classes, channels, tuple(bool(want) for want in wanted), potts, REALS[str(right.dtype)[6:]]
    )
    inputs, sizes = [left, right, source, destination, stacked], (batch, height, width)
    values = torch.empty_like(source)
    launch(program, ENERGY_KERNELS[0], inputs, sizes, [sums, values])
    if any(wanted):
        towards = torch.empty_like(stacked)
        launch(program, ENERGY_KERNELS[1], inputs, sizes, [towards])
        first = 0
        for index, count, want in zip(feature_of_term, channels, wanted, strict=True):
            if want:
                gradients[index].copy_(towards[:, first : first + count])
            first += count
    return values.double().sum()


def _compare(place: torch.device) -> Iterator[Finding]:
    """Small problems in both types and both directions of the gradient."""
    import torch

    parameters = EnergyParameters(radius=2, terms=(EnergyTerm(weight=0.9, xy_sigma=3.0), EnergyTerm(weight=0.1)))
    yield "float32", _difference(parameters, place, torch.float32), 1e-3
    yield "float64", _difference(parameters, place, torch.float64), 1e-3
    one_way = parameters.model_copy(update={"one_way": True})
    yield "one-way gradient", _difference(one_way, place, torch.float32), 1e-3


#: Why the form cannot be used on a CUDA device of a number, None if it can.
check = DeviceCheck(_compare)


def _difference(parameters: EnergyParameters, place: torch.device, dtype: torch.dtype) -> float:
    """Largest difference from plain torch on a small problem; NaN if there is one."""
    import torch

    from wsss_deploy.pairwise import energy_reference

    generator = torch.Generator().manual_seed(0)
    p, rgb, deep, s, d = (
        torch.rand(2, count, 9, 37, generator=generator, dtype=torch.float64, device="cpu").to(place, dtype)
        for count in (5, 3, 4, 1, 1)
    )
    wanted, pair = (False, True), energy_reference.sides(p, s, d, None, parameters.one_way)
    sums, grads = torch.empty_like(pair.left), [torch.empty_like(rgb), torch.empty_like(deep)]
    value = energy(
        pair.left.contiguous(),
        pair.right.contiguous(),
        pair.gates,
        sums,
        False,
        parameters,
        [rgb, deep],
        grads,
        [0, 1],
        wanted,
    )
    expected = energy_reference.energy(p, s, d, None, [rgb, deep], parameters, wanted)
    towards = pair.gradient(sums, s, d, p.shape[1], parameters.one_way)
    found = [(value / p.numel(), expected[0] / p.numel()), (towards, expected[1])]
    found += [(one, other) for one, other in zip(grads, expected[2], strict=True) if other is not None]
    if not parameters.one_way:
        potts = torch.empty_like(p)
        value = energy(p, p, (s, d), potts, True, parameters, [rgb, deep], grads, [0, 1], wanted)
        found += [(value / p.numel(), expected[0] / p.numel()), (potts, expected[1])]
    return float(torch.stack([(one.double() - other.double()).abs().max().cpu() for one, other in found]).max())
