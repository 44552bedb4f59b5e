"""The Gated CRF energy over all pairs of a small map, as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.losses.gated_crf import XY, Kernel


def dense_pair_energy(
    probabilities: Tensor,
    kernels: tuple[Kernel, ...],
    modalities: dict[str, Tensor],
    source: Tensor,
    destination: Tensor,
) -> Tensor:
    r"""Sum over all ordered pairs i != j of d_i s_j K_ij (1 - <p_i, p_j>); neither windowed nor divided by anything.

    The kernel and the masks are constants. Each image's K takes (H W)^2 values while it is worked on; the gradient is
    formed with the value (first order), so that no K is kept for it.

    Args:
        probabilities: p (N, C, H, W).
        kernels: Gaussians that add up to K, as in `gated_crf_loss`.
        modalities: By name (N, C_m, H, W).
        source: s (N, 1, H, W).
        destination: d (N, 1, H, W).

    Returns:
        Scalar.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
        height, width = p.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([rows, columns]).to(p).expand(len(p), -1, -1, -1)
        given = {name: maps.detach().to(p) for name, maps in modalities.items()} | {XY: grid}
        gates = source.detach().to(p), destination.detach().to(p)
        total: Tensor = _Dense.apply(p, kernels, given, *gates)
        return total


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        kernels: tuple[Kernel, ...],
        given: dict[str, Tensor],
        source: Tensor,
        destination: Tensor,
    ) -> Tensor:
        total, gradient = p.new_zeros(()), torch.empty_like(p)
        for index in range(len(p)):
            flat = p[index].flatten(1)
            affinity = p.new_zeros(flat.shape[1], flat.shape[1])
            for kernel in kernels:
                scaled = [given[name][index].flatten(1) / sigma for name, sigma in kernel.sigmas.items()]
                feature = torch.cat(scaled).T.contiguous()
                affinity += kernel.weight * torch.exp(-torch.cdist(feature, feature).square() / 2)
            affinity.fill_diagonal_(0)
            s, d = source[index].flatten(), destination[index].flatten()
            # Both directions of a pair share (d_i s_j + d_j s_i) / 2.
            affinity = (d[:, None] * affinity * s + s[:, None] * affinity * d) / 2
            drawn = flat @ affinity
            total += affinity.sum() - (flat * drawn).sum()
            gradient[index] = (-2 * drawn).view_as(p[index])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None, None
