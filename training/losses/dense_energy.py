"""The Gated CRF energy over all pairs of a small map, as matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from training.losses.gated_crf import XY, Kernel


def dense_pair_energy(
    probabilities: Tensor,
    kernels: tuple[Kernel, ...],
    modalities: dict[str, Tensor],
    source: Tensor,
    destination: Tensor,
) -> Tensor:
    r"""Sum over all ordered pairs i != j of d_i s_j K_ij (1 - <p_i, p_j>); neither windowed nor divided by anything.

    The kernel and the masks are constants. Each image's K takes (H W)^2 values while it is worked on.

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
        total = p.new_zeros(())
        for index in range(len(p)):
            with torch.no_grad():
                affinity = p.new_zeros(height * width, height * width)
                for kernel in kernels:
                    scaled = [given[name][index].flatten(1) / sigma for name, sigma in kernel.sigmas.items()]
                    feature = torch.cat(scaled).T.contiguous()
                    affinity += kernel.weight * torch.exp(-torch.cdist(feature, feature).square() / 2)
                affinity.fill_diagonal_(0)
                s, d = (mask[index].detach().to(p).flatten() for mask in (source, destination))
                # Both directions of a pair share (d_i s_j + d_j s_i) / 2.
                affinity = (d[:, None] * affinity * s + s[:, None] * affinity * d) / 2
            flat = p[index].flatten(1)
            total = total + affinity.sum() - (flat * (flat @ affinity)).sum()
        return total
