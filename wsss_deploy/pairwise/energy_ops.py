"""The pair energy as the torch custom operator `torch.ops.wsss.pairwise_energy`: eager, autograd, torch.compile.

One sweep gives the value and its gradients, which backward only scales. Parameters travel as their canonical JSON.
Gradients are first order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wsss_deploy.pairwise import energy_cuda_form, energy_reference, native
from wsss_deploy.pairwise.energy_parameters import EnergyParameters
from wsss_deploy.pairwise.first_order import scaled_once


@functools.lru_cache(maxsize=64)
def parse(parameters: str) -> EnergyParameters:
    """The parameters object of its JSON text."""
    return EnergyParameters.model_validate_json(parameters)


@torch.library.custom_op("wsss::pairwise_energy", mutates_args=())
def pairwise_energy(
    probabilities: Tensor,
    source: Tensor,
    destination: Tensor,
    matrix: Tensor | None,
    features: Sequence[Tensor],
    feature_of_term: Sequence[int],
    wanted: Sequence[bool],
    parameters: str,
    form: str,
    threads: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Value and gradients of `energy_reference.energy`.

    Args:
        probabilities: (N, C, H, W).
        source: s, (N, 1, H, W).
        destination: d, (N, 1, H, W).
        matrix: M (C, C); None is Potts.
        features: Maps (N, G, H, W), divided by their sigmas.
        feature_of_term: Per term its map's number in `features`, each map for one term only; -1 is none.
        wanted: Per term, whether the gradient of its map is computed. (Never empty, as torch asks of such lists.)
        parameters: JSON of `EnergyParameters`.
        form: "cpu", "cuda" or "torch".
        threads: Of the compiled form.

    Returns:
        The value; its gradient to the probabilities; per map its gradient, empty where not wanted. Only the value
        is differentiable.
    """
    settings = parse(parameters)
    if form not in ("cpu", "cuda"):
        of_term = [None if index < 0 else features[index] for index in feature_of_term]
        gates = source, destination
        value, towards, grads = energy_reference.energy(probabilities, *gates, matrix, of_term, settings, wanted)
        maps = [probabilities.new_empty(0) for _ in features]
        for index, grad in zip(feature_of_term, grads, strict=True):
            if grad is not None:
                maps[index] = grad
        return value, towards.contiguous(), maps  # as the fake kernel has it, whatever the inputs' layout
    p, s, d = (tensor.detach().contiguous() for tensor in (probabilities, source, destination))
    maps = [f.detach().contiguous() for f in features]
    grads_out = _gradients(maps, feature_of_term, wanted)
    kernel = (settings, maps, grads_out, feature_of_term, wanted)

    def swept(left: Tensor, right: Tensor, gates: tuple[Tensor, Tensor] | None, sums: Tensor, potts: bool) -> Tensor:
        if form == "cuda":
            return energy_cuda_form.energy(left, right, gates, sums, potts, *kernel).to(p.dtype)
        return p.new_tensor(native.energy(left, right, gates, sums, potts, *kernel, threads))

    if matrix is None and not settings.one_way:
        # No channel of ones and no negated copy: the kernels know this energy.
        towards = torch.empty_like(p)
        total = swept(p, p, (s, d), towards, True)
    else:
        pair = energy_reference.sides(p, s, d, None if matrix is None else matrix.detach(), settings.one_way)
        sums = torch.empty_like(pair.left)
        total = swept(pair.left.contiguous(), pair.right.contiguous(), pair.gates, sums, False)
        towards = pair.gradient(sums, s, d, p.shape[1], settings.one_way)
    return total, towards, grads_out


@pairwise_energy.register_fake
def _(
    probabilities: Tensor,
    source: Tensor,
    destination: Tensor,
    matrix: Tensor | None,
    features: Sequence[Tensor],
    feature_of_term: Sequence[int],
    wanted: Sequence[bool],
    parameters: str,
    form: str,
    threads: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = probabilities.shape
    return probabilities.new_empty(()), probabilities.new_empty(shape), _gradients(features, feature_of_term, wanted)


def _gradients(features: Sequence[Tensor], feature_of_term: Sequence[int], wanted: Sequence[bool]) -> list[Tensor]:
    numbers = {index for index, want in zip(feature_of_term, wanted, strict=True) if want}
    return [f.new_empty(f.shape if number in numbers else 0) for number, f in enumerate(features)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    _, towards, grads = output
    ctx.wanted = {index for index, want in zip(inputs[5], inputs[6], strict=True) if want}
    ctx.save_for_backward(inputs[0], towards, *inputs[4], *grads)


def _backward(ctx: Any, grad: Tensor, _towards: Any, _grads: Any) -> tuple[Any, ...]:
    probabilities, towards, *saved = ctx.saved_tensors
    maps, slopes = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    features = [
        scaled_once(grad, slope, maps[number]) if number in ctx.wanted else None for number, slope in enumerate(slopes)
    ]
    return scaled_once(grad, towards, probabilities), None, None, None, features, *[None] * 5


pairwise_energy.register_autograd(_backward, setup_context=_context)
