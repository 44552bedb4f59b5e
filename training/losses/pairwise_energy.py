"""The sum over pixel pairs behind the Gated CRF loss, streamed over half of the window.

Maps are padded on the right by the window's reach and flattened, (N, C, H, W) -> (N, C, H * (W + reach)), so that an
offset (dy, dx) is one shift of a long row. Padded pixels hold zeros and so drop out of every pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class KernelTerm:
    """One Gaussian of the kernel without its image features, which travel as tensors.

    Attributes:
        weight: Factor of the Gaussian.
        xy_sigma: Spatial width in prediction pixels; None leaves position out.
    """

    weight: float
    xy_sigma: float | None

    def spatial(self, dy: int, dx: int) -> float:
        """Weight times the factor that depends on the offset alone."""
        if self.xy_sigma is None:
            return self.weight
        return self.weight * math.exp(-(dy * dy + dx * dx) / (2 * self.xy_sigma**2))


@dataclass(frozen=True)
class Plan:
    """What is fixed over a call.

    Attributes:
        radius: Half the window's side; the window is square and its centre is left out.
        terms: Gaussians that add up to the kernel.
        one_way: Leave out the gradient to the neighbour's factor.
    """

    radius: int
    terms: tuple[KernelTerm, ...]
    one_way: bool


class PairwiseEnergy(torch.autograd.Function):
    """E = sum over ordered pairs in the window of d_i s_j K_ij e(p_i, p_j), not yet divided by Z.

    e is 1 - <p_i, p_j> (Potts), or p_i^T M p_j with a class matrix M. Either way it is a scalar product
    <left_i, right_j>: (p, 1) with (-p, 1), or p with M p. So the neighbour sums S_i = sum_j K_ij right_j hold the
    value, sum_i <left_i, S_i>, and the gradient at once. They are kept for backward, which costs nothing then; the
    peak of everything is O(N C H W).

    Where e is symmetric and the gradient goes both ways, the two directions of a pair share the weight
    K_ij (d_i s_j + d_j s_i). Else both directions travel as channels of their own, gated by the sender's mask
    before the sum and by the receiver's after it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        probabilities: Tensor,
        source: Tensor,
        destination: Tensor,
        matrix: Tensor | None,
        plan: Plan,
        *features: Tensor | None,
    ) -> Tensor:
        """Value of the energy.

        Args:
            ctx: Autograd's.
            probabilities: (N, C, H, W).
            source: s, (N, 1, H, W), 0 or 1.
            destination: d, (N, 1, H, W), 0 or 1.
            matrix: M (C, C); None is Potts.
            plan: Window, kernel, direction.
            features: Per kernel term (N, G, H, W), divided by its sigmas; None where the term has position only.
        """
        classes = probabilities.shape[1]
        if matrix is None:
            ones = torch.ones_like(probabilities[:, :1])
            left = torch.cat([probabilities, ones], dim=1)
            right = reverse = torch.cat([-probabilities, ones], dim=1)
            symmetric = True
        else:
            left = probabilities
            right = torch.einsum("ck,nkhw->nchw", matrix, probabilities)
            reverse = torch.einsum("kc,nkhw->nchw", matrix, probabilities)
            symmetric = torch.equal(matrix, matrix.mT)

        wanted = ctx.needs_input_grad[5:]
        if symmetric and not plan.one_way:
            sums, grads = _neighbour_sums(plan, left, right, (source, destination), features, wanted)
            towards = sums[:, :classes]
        else:
            left = torch.cat([destination * left, source * left], dim=1)
            right = torch.cat([source * right, destination * reverse], dim=1)
            sums, grads = _neighbour_sums(plan, left, right, None, features, wanted)
            towards = destination * sums[:, :classes]
            if not plan.one_way:
                half = sums.shape[1] // 2
                towards = towards + source * sums[:, half : half + classes]
        ctx.save_for_backward(towards, *grads)
        return (left * sums).sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to the probabilities and, where asked for, to the features."""
        towards, *features = ctx.saved_tensors
        return (grad * towards, None, None, None, None, *(None if kept is None else grad * kept for kept in features))


def _neighbour_sums(
    plan: Plan,
    left: Tensor,
    right: Tensor,
    gates: tuple[Tensor, Tensor] | None,
    features: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """S_i = sum_j K_ij g_ij right_j and the gradient of sum_(i<j) K_ij g_ij <left_i, right_j> to the features.

    Args:
        plan: Window and kernel.
        left: (N, D, H, W); used for the features' gradient only.
        right: (N, D, H, W).
        gates: s and d, (N, 1, H, W), of g_ij = d_i s_j + d_j s_i; None is 1.
        features: See `PairwiseEnergy.forward`.
        wanted: Which features need a gradient.

    Returns:
        S (N, D, H, W); per feature its gradient (N, G, H, W) or None.
    """
    height, width = right.shape[-2:]
    reach = min(plan.radius, width - 1)

    def row(maps: Tensor) -> Tensor:
        return F.pad(maps, (0, reach)).flatten(2)

    def unrow(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], height, width + reach)[..., :width]

    # exp(-|f|^2) instead of exp(-|f|^2 / 2) saves an operation per offset.
    scaled = [None if f is None else row(f * math.sqrt(0.5)) for f in features]
    grads = [torch.zeros_like(f) if f is not None and want else None for f, want in zip(scaled, wanted, strict=True)]
    left_rows = row(left) if any(wanted) else None
    gate_rows = None if gates is None else (row(gates[0]), row(gates[1]))
    ones = row(torch.ones_like(right[:, :1]))
    right_rows = row(right)
    sums = torch.zeros_like(right_rows)
    for dy, dx, shift in _half_window(height, width, plan.radius, width + reach):
        here, there = slice(None, -shift), slice(shift, None)
        gate = ones[..., here]
        if gate_rows is not None:
            s, d = gate_rows
            gate = (d[..., here] * s[..., there]).addcmul_(s[..., here], d[..., there])
        weight: Tensor | None = None
        for index, term in enumerate(plan.terms):
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
    return unrow(sums), [None if grad is None else unrow(grad) for grad in grads]


def _half_window(height: int, width: int, radius: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Offsets (dy, dx) of which the window holds this one or its opposite, with the shift in a row; inside the map."""
    reach = min(radius, width - 1)
    for dy in range(min(radius, height - 1) + 1):
        for dx in range(-reach if dy else 1, reach + 1):
            yield dy, dx, dy * stride + dx
