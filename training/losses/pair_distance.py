"""Sums over pixel pairs of a function of the distance of their features, with the gradient gathered on the way.

Autograd over all offsets of a window would keep E channels for each of them. Here every offset is visited once, only
pairs that count are gathered, and the gradient to the features is summed in the same pass: the peak is a few maps of E
channels, whatever the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from wsss_deploy.pairwise.first_order import scaled_once

Distance = Literal["l1", "cosine"]


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of one offset, as positions in flat rows.

    Attributes:
        first: int64 (M,).
        second: int64 (M,).
        weight: How many ordered pairs each stands for, (M,).
        offset: (dy, dx) from first to second.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    offset: tuple[int, int]


class PairScore(Protocol):
    """What a sum adds up."""

    def pairs(self) -> Iterator[Pairs]:
        """The pairs that count, an offset at a time."""

    def score(self, pairs: Pairs, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Values of K sums over these pairs, (K,), and the slope (M,) of the whole by each distance (M,)."""


class PairSums(torch.autograd.Function):
    """Sum over pairs of `score(distance of features)`.

    The distance is mean_c |g_i - g_j| ("l1"; its gradient where two values are equal is 0) or -<g_i, g_j> ("cosine",
    for features of unit length).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, score: PairScore, distance: Distance, count: int) -> tuple[Tensor, Tensor]:
        """Value of the sum.

        Args:
            ctx: Autograd's.
            rows: Features (pixels, E).
            score: Pairs and values.
            distance: See the class.
            count: K, the number of partial sums.

        Returns:
            The total, of which the gradient is known, and its K parts, of which it is not.
        """
        parts = rows.new_zeros(count)
        grad = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        for pairs in score.pairs():
            one, two = rows[pairs.first], rows[pairs.second]
            if distance == "l1":
                step = one - two
                values, slopes = score.score(pairs, step.abs().mean(1))
            else:
                values, slopes = score.score(pairs, -(one * two).sum(1))
            parts += values
            if grad is None:
                continue
            # Within one offset every position occurs once on each side, so the sums do not depend on an order.
            if distance == "l1":
                pull = step.sign_().mul_(slopes[:, None] / rows.shape[1])
                grad.index_add_(0, pairs.first, pull)
                grad.index_add_(0, pairs.second, pull, alpha=-1)
            else:
                grad.index_add_(0, pairs.first, two * -slopes[:, None])
                grad.index_add_(0, pairs.second, one * -slopes[:, None])
        total = parts.sum()
        ctx.save_for_backward(*(() if grad is None else (rows, grad)))
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient to the features."""
        rows, kept = ctx.saved_tensors
        return scaled_once(grad, kept, rows), None, None, None


def half_window(radius: int) -> Iterator[tuple[int, int]]:
    """Offsets (dy, dx) of which the square window holds this one and its opposite; the centre is left out."""
    for dy in range(radius + 1):
        for dx in range(-radius if dy else 1, radius + 1):
            yield dy, dx
