"""Class activation maps: pooling of class scores, multi-scale maps, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.errors import UsageError

PUBLISHED_SCALES = (1.0, 0.5, 1.5)


def pool_scores(maps: Tensor, fraction: float, valid: Tensor | None = None) -> Tensor:
    """Image scores from maps of class scores: the mean of each class's highest cells.

    Args:
        maps: (N, K, h, w).
        fraction: Part of the valid cells that count, in [0, 1]: 1 is average pooling, 0 max pooling (one cell).
        valid: Part of each cell that lies in the image (N, h, w), in [0, 1]; cells below one half never count, and
            an image without any other counts all of them. None: all cells.

    Returns:
        (N, K).
    """
    flat = maps.flatten(2)
    if valid is None:
        valid = torch.ones_like(maps[:, 0])
    inside = valid.flatten(1) >= 0.5
    inside = inside | ~inside.any(dim=1, keepdim=True)
    count = inside.sum(dim=1, keepdim=True)
    taken = (count * fraction).round().clamp(min=1)
    if fraction == 1:
        return (flat * inside[:, None]).sum(dim=2) / count
    order = flat.masked_fill(~inside[:, None], -torch.inf).sort(dim=2, descending=True).values
    rank = torch.arange(flat.shape[2], device=maps.device)
    return order.where(rank < taken[:, :, None], 0).sum(dim=2) / taken


def normalise_cams(maps: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Each map to [0, 1): minus its minimum, divided by its maximum plus epsilon; a constant map becomes 0.

    Args:
        maps: (N, K, H, W).
        epsilon: Keeps a constant map from dividing by zero.

    Returns:
        (N, K, H, W).
    """
    maps = maps - maps.amin(dim=(2, 3), keepdim=True)
    return maps / (maps.amax(dim=(2, 3), keepdim=True) + epsilon)


def multi_scale_cams(
    class_scores: Callable[[Tensor], Tensor],
    image: Tensor,
    scales: Sequence[float] = PUBLISHED_SCALES,
    stride: int = 1,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """CAMs over scales and flips (AFA, TSCD): the larger of the image's and its mirror's map, positive part, summed.

    Run under no_grad and with the network in evaluation mode: the release runs it in training mode, where stochastic
    depth makes CAMs noisy and further batches drift into running statistics.

    Args:
        class_scores: Image (N, 3, h, w) to maps of class scores (N, K, h', w').
        image: Normalised (N, 3, H, W).
        scales: Factors of the image's size.
        stride: Scaled sizes are rounded to multiples of this; 1 truncates to whole pixels, as published.
        size: Height and width of the result; None is the image's.

    Returns:
        (N, K, *size), each map normalised to [0, 1] whether its class is present or not.

    Raises:
        UsageError: No scales.
    """
    if not scales:
        raise UsageError("no scales were given for the CAMs; give at least one, for example (1.0,)")
    size = size or (image.shape[-2], image.shape[-1])
    total: Tensor | None = None
    for scale in scales:
        scaled = _scaled(image, scale, stride)
        both = class_scores(torch.cat([scaled, scaled.flip(3)]))
        both = F.interpolate(both.to(image.dtype), size=size, mode="bilinear", align_corners=False)
        straight, mirrored = both.chunk(2)
        merged = torch.maximum(straight, mirrored.flip(3)).relu()
        total = merged if total is None else total + merged
    assert total is not None
    return normalise_cams(total)


def _scaled(image: Tensor, scale: float, stride: int) -> Tensor:
    sides = [
        max(stride, int(scale * side) if stride == 1 else round(scale * side / stride) * stride)
        for side in image.shape[-2:]
    ]
    if sides == list(image.shape[-2:]):
        return image
    return F.interpolate(image, size=sides, mode="bilinear", align_corners=False)
