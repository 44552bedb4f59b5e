"""Labels carried along paths of like colour: pseudo-labels from the labels and the image alone.

A geodesic distance, after Bai and Sapiro, "A Geodesic Framework for Fast Interactive Image and Video Segmentation and
Matting", ICCV 2007, with colour in place of class likelihoods. Dilates points and scribbles up to what looks like a
border; where two labels meet, the nearer one wins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError

_RING = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)


def spread_labels(labels: Tensor, image: Tensor, rgb: float, xy: float, limit: float = 1.0) -> Tensor:
    r"""Each pixel's label is that of the labelled pixel at the least cost of a path, if that is at most `limit`.

    .. math:: cost = \min_{path} \sum_{steps} |I_a - I_b| / rgb + |x_a - x_b| / xy

    with the Euclidean norm of the colours, over paths of the eight neighbours. No gradient.

    Args:
        labels: int64 (N, H, W); 255 is unlabelled.
        image: (N, 3, H, W).
        rgb: Change of colour along a path that costs 1.
        xy: Length of a path that costs 1, in pixels.
        limit: Largest cost.

    Returns:
        int64 (N, H, W); labelled pixels keep their labels.

    Raises:
        UsageError: Sizes that differ.
    """
    if image.shape[-2:] != labels.shape[-2:] or len(image) != len(labels):
        raise UsageError(f"labels are {tuple(labels.shape)}, the image {tuple(image.shape)}; expected one size")
    with torch.no_grad():
        height, width = labels.shape[-2:]
        padded = F.pad(image.float(), (1, 1, 1, 1))
        steps = []
        for dy, dx in _RING:
            there = padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
            steps.append((there - image).square().sum(1).sqrt() / rgb + math.hypot(dy, dx) / xy)
        cost = torch.full(labels.shape, math.inf, device=labels.device)
        cost[labels != IGNORE_INDEX] = 0
        carried = labels.clone()
        highest = limit * (1 + 1e-6)  # a sum of steps that should be the limit may be rounded to more
        # No path within the limit has more steps than this; most calls settle earlier.
        for _ in range(math.ceil(limit * xy)):
            before = cost
            costs, ids = F.pad(cost, (1, 1, 1, 1), value=math.inf), F.pad(carried, (1, 1, 1, 1), value=IGNORE_INDEX)
            for (dy, dx), step in zip(_RING, steps, strict=True):
                window = (..., slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width))
                offered = costs[window] + step
                better = (offered < cost) & (offered <= highest)
                cost = torch.where(better, offered, cost)
                carried = torch.where(better, ids[window], carried)
            if torch.equal(cost, before):
                break
        return carried
