"""Affinity of image positions, predicted from attention and taught by pseudo-labels.

Ru et al., "Learning Affinity from Attention" (AFA), CVPR 2022, arXiv 2203.02664, section 3.3; kept by TSCD (arXiv
2302.13765). Decisions: docs/tags.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError


def window_mask(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """Which pairs of positions lie within a square window of each other.

    Args:
        height: Of the grid.
        width: Of the grid.
        radius: Half the window's side in cells.
        device: Where the mask lies.

    Returns:
        bool (n, n), n = height * width, row by row.
    """
    ys, xs = (torch.arange(side, device=device) for side in (height, width))
    near_y, near_x = ((axis[:, None] - axis).abs() <= radius for axis in (ys, xs))
    return (near_y[:, None, :, None] & near_x[None, :, None, :]).reshape(height * width, height * width)


def affinity_labels(labels: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Labels of pairs of positions.

    Args:
        labels: Class ids (N, H, W), 255 = ignore.
        grid: Height and width to which the labels are brought (nearest).
        radius: Half the window's side in cells of the grid.

    Returns:
        int64 (N, n, n): 1 same class (background with background too), 0 different, 255 where either is ignored or
        the pair is farther apart than the window.
    """
    small = F.interpolate(labels[:, None].float(), size=grid, mode="nearest")[:, 0].long().flatten(1)
    pairs = (small[:, :, None] == small[:, None, :]).long()
    known = small != IGNORE_INDEX
    use = known[:, :, None] & known[:, None, :] & window_mask(*grid, radius, labels.device)
    return pairs.masked_fill_(~use, IGNORE_INDEX)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    r"""Balanced L1 of pairs over the whole batch.

    .. math:: L = \frac{1}{2} \frac{\sum_+ (1 - E)}{n_+ + 1} + \frac{1}{2} \frac{\sum_- E}{n_- + 1}

    Args:
        affinity: E (N, n, n) in (0, 1).
        labels: int64 (N, n, n) of `affinity_labels`.

    Returns:
        Scalar, float32 or float64; exactly 0 when every pair is ignored.

    Raises:
        UsageError: The shapes differ.
    """
    if affinity.shape != labels.shape:
        raise UsageError(f"affinity is {tuple(affinity.shape)}, its labels {tuple(labels.shape)}; expected equal")
    with torch.autocast(affinity.device.type, enabled=False):
        affinity = affinity.to(torch.promote_types(affinity.dtype, torch.float32))
        same, other = (labels == 1).to(affinity.dtype), (labels == 0).to(affinity.dtype)
        positive = (same * (1 - affinity)).sum() / (same.sum() + 1)
        negative = (other * affinity).sum() / (other.sum() + 1)
        return (positive + negative) / 2


def propagate(maps: Tensor, affinity: Tensor, radius: int) -> Tensor:
    r"""One step of a random walk along predicted affinity.

    .. math:: T_{ij} = E_{ij}^2 / (\textstyle\sum_i E_{ij}^2 + 0.1), \quad m'_j = \sum_i m_i T_{ij}

    E is zero outside the window; the square is element by element, as in the release. Computed in float32 at least,
    whatever autocast says.

    Args:
        maps: (N, C, h, w), for example softmaxed CAMs with background.
        affinity: E (N, n, n), n = h * w.
        radius: Half the window's side in cells.

    Returns:
        (N, C, h, w).
    """
    height, width = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(maps.dtype, affinity.dtype), torch.float32)
        transition = affinity.to(dtype) * window_mask(height, width, radius, maps.device)
        transition = transition.square()
        transition = transition / (transition.sum(dim=1, keepdim=True) + 0.1)
        return (maps.to(dtype).flatten(2) @ transition).reshape(maps.shape)
