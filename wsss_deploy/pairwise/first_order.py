"""Gradients that were formed with the value: to be scaled once, and never differentiated again."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from wsss_deploy.errors import UsageError


def scaled_once(grad: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
    """`grad * kept`, the gradient of a scalar to `wanted`, of which a derivative is an error instead of silently 0.

    Args:
        grad: Of the scalar.
        kept: Its derivative by `wanted`, a constant to autograd although it depends on `wanted`.
        wanted: What the gradient is for.
    """
    if not torch.is_grad_enabled():
        return grad * kept
    scaled: Tensor = _Once.apply(grad, kept.detach(), wanted)
    return scaled


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
        return grad * kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UsageError(
            "the derivative of a pair loss's gradient was asked for (create_graph=True); it has first derivatives only"
        )
