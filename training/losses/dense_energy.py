"""The Gated CRF energy over all pairs of a small map, as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.losses.gated_crf import XY, Kernel
from wsss_deploy.pairwise.first_order import scaled_once


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
            affinity = _affinity(kernels, {name: maps[index].flatten(1) for name, maps in given.items()})
            s, d = source[index].flatten(), destination[index].flatten()
            # Both directions of a pair share (d_i s_j + d_j s_i) / 2; the affinity is symmetric.
            drawn = (d * ((s * flat) @ affinity) + s * ((d * flat) @ affinity)) / 2
            total += d @ (affinity @ s) - (flat * drawn).sum()
            gradient[index] = (-2 * drawn).view_as(p[index])
        ctx.save_for_backward(p, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        p, gradient = ctx.saved_tensors
        return scaled_once(grads[0], gradient, p), None, None, None, None


def _affinity(kernels: tuple[Kernel, ...], given: dict[str, Tensor]) -> Tensor:
    """K of one image, (H W, H W) with zeros on the diagonal, in as few matrices of that size as there can be."""
    affinity: Tensor | None = None
    for kernel in kernels:
        feature = torch.cat([given[name] / sigma for name, sigma in kernel.sigmas.items()]).T.contiguous()
        link = torch.cdist(feature, feature).square_().mul_(-0.5).exp_().mul_(kernel.weight)
        affinity = link if affinity is None else affinity.add_(link)
    assert affinity is not None, "the settings ask for a kernel"
    return affinity.fill_diagonal_(0)
