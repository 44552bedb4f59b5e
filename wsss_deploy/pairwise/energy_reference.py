"""The pair energy in plain torch, streamed over half of the window: what the compiled form is tested against.

Maps are padded on the right by the window's reach and flattened, (N, C, H, W) -> (N, C, H * (W + reach)), so that an
offset (dy, dx) is one shift of a long row. Padded pixels hold zeros and so drop out of every pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.pairwise.energy_parameters import EnergyParameters

Sums = tuple[Tensor, list[Tensor | None]]


@dataclass(frozen=True)
class Sides:
    """The energy as sum over unordered pairs of K_ij g_ij <left_i, right_j>, symmetric in i and j.

    e_ij is 1 - <p_i, p_j> (Potts), or p_i^T M p_j with a class matrix M. Either way it is a scalar product: (p, 1)
    with (-p, 1), or p with M p. So the neighbour sums S_i = sum_j K_ij g_ij right_j hold the value,
    sum_i <left_i, S_i> / 2, and the gradient at once.

    Where e is symmetric and the gradient goes both ways, the two directions of a pair share the gate
    g_ij = d_i s_j + d_j s_i. Else both directions travel as channels of their own, gated by the sender's mask before
    the sum and by the receiver's after it.

    Attributes:
        left: (N, D, H, W).
        right: (N, D, H, W).
        gates: s and d, (N, 1, H, W) each; None is g = 1.
        halves: Whether the channels hold both directions.
    """

    left: Tensor
    right: Tensor
    gates: tuple[Tensor, Tensor] | None
    halves: bool

    def gradient(self, sums: Tensor, source: Tensor, destination: Tensor, classes: int, one_way: bool) -> Tensor:
        """What the neighbour sums say of the gradient to the probabilities, (N, classes, H, W)."""
        if not self.halves:
            return sums[:, :classes].contiguous()
        towards = destination * sums[:, :classes]
        if not one_way:
            half = sums.shape[1] // 2
            towards = towards + source * sums[:, half : half + classes]
        return towards


def sides(probabilities: Tensor, source: Tensor, destination: Tensor, matrix: Tensor | None, one_way: bool) -> Sides:
    """Both factors of every pair's energy.

    Args:
        probabilities: (N, C, H, W).
        source: s, (N, 1, H, W).
        destination: d, (N, 1, H, W).
        matrix: M (C, C); None is Potts.
        one_way: See `EnergyParameters`.
    """
    if matrix is None:
        ones = torch.ones_like(probabilities[:, :1])
        left = torch.cat([probabilities, ones], dim=1)
        right = reverse = torch.cat([-probabilities, ones], dim=1)
    else:
        left = probabilities
        right = torch.einsum("ck,nkhw->nchw", matrix, probabilities)
        reverse = torch.einsum("kc,nkhw->nchw", matrix, probabilities)
    if not one_way and (matrix is None or torch.equal(matrix, matrix.mT)):
        return Sides(left, right, (source, destination), halves=False)
    left = torch.cat([destination * left, source * left], dim=1)
    right = torch.cat([source * right, destination * reverse], dim=1)
    return Sides(left, right, None, halves=True)


def energy(
    probabilities: Tensor,
    source: Tensor,
    destination: Tensor,
    matrix: Tensor | None,
    features: Sequence[Tensor | None],
    parameters: EnergyParameters,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """E = sum over ordered pairs in the window of d_i s_j K_ij e(p_i, p_j), and its gradients.

    Args:
        probabilities: (N, C, H, W).
        source: s, (N, 1, H, W).
        destination: d, (N, 1, H, W).
        matrix: M (C, C); None is Potts.
        features: Per term (N, G, H, W), divided by its sigmas; None where the term has position only.
        parameters: Window, kernel, direction.
        wanted: Per term, whether its features need a gradient.

    Returns:
        E, a scalar; dE/dp (N, C, H, W); per term dE/df or None.
    """
    pair = sides(probabilities, source, destination, matrix, parameters.one_way)
    sums, grads = _neighbour_sums(pair, features, parameters, wanted)
    # Pixel by pixel first: where equal one-hot predictions cancel, they do so exactly.
    value = (pair.left * sums).sum(1).sum() / 2
    classes = probabilities.shape[1]
    return value, pair.gradient(sums, source, destination, classes, parameters.one_way), grads


def _neighbour_sums(
    pair: Sides, features: Sequence[Tensor | None], parameters: EnergyParameters, wanted: Sequence[bool]
) -> Sums:
    """S (N, D, H, W), and per term the gradient of the energy to its features (N, G, H, W) or None."""
    height, width = pair.right.shape[-2:]
    reach = min(parameters.radius, width - 1)

    def row(maps: Tensor) -> Tensor:
        return F.pad(maps, (0, reach)).flatten(2)

    def unrow(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], height, width + reach)[..., :width]

    # exp(-|f|^2) instead of exp(-|f|^2 / 2) saves an operation per offset.
    scaled = [None if f is None else row(f * math.sqrt(0.5)) for f in features]
    grads = [torch.zeros_like(f) if f is not None and want else None for f, want in zip(scaled, wanted, strict=True)]
    left_rows = row(pair.left) if any(wanted) else None
    gate_rows = None if pair.gates is None else (row(pair.gates[0]), row(pair.gates[1]))
    right_rows = row(pair.right)
    ones = row(torch.ones_like(pair.right[:, :1]))
    sums = torch.zeros_like(right_rows)
    for dy, dx, shift in half_window(height, width, parameters.radius, width + reach):
        here, there = slice(None, -shift), slice(shift, None)
        gate = ones[..., here]
        if gate_rows is not None:
            s, d = gate_rows
            gate = (d[..., here] * s[..., there]).addcmul_(s[..., here], d[..., there])
        weight: Tensor | None = None
        for index, term in enumerate(parameters.terms):
            feature, grad = scaled[index], grads[index]
            if feature is None:
                part = gate * term.spatial(dy, dx)
            else:
                step = feature[..., here] - feature[..., there]
                part = step.square().sum(1, keepdim=True).neg_().exp_().mul_(term.spatial(dy, dx)).mul_(gate)
                if grad is not None and left_rows is not None:
                    energy = (left_rows[..., here] * right_rows[..., there]).sum(1, keepdim=True)
                    pull = step.mul_(energy.mul_(part).mul_(-math.sqrt(2.0)))
                    grad[..., here].add_(pull)
                    grad[..., there].sub_(pull)
            weight = part if weight is None else weight.add_(part)
        assert weight is not None  # there is at least one term
        sums[..., here].addcmul_(weight, right_rows[..., there])
        sums[..., there].addcmul_(weight, right_rows[..., here])
    return unrow(sums), [None if grad is None else unrow(grad).contiguous() for grad in grads]


def half_window(height: int, width: int, radius: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Offsets (dy, dx) of which the window holds this one or its opposite, with the shift in a row; inside the map."""
    reach = min(radius, width - 1)
    for dy in range(min(radius, height - 1) + 1):
        for dx in range(-reach if dy else 1, reach + 1):
            yield dy, dx, dy * stride + dx
