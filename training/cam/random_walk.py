"""Given labels of an image carried to all of its positions along features that are alike: an absorbing random walk.

Grady, "Random Walks for Image Segmentation" (TPAMI 2006): a position has the class of the label at which a walker that
starts there arrives first. Here it walks between all positions rather than neighbours, by the features of a frozen
encoder in place of colours, and gives up now and then (Tong et al., "Fast Random Walk with Restart", ICDM 2006) for
what a classifier of the whole data set says of the place where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX

# Positions between which it walks at most: each of a few matrices of them takes 64 MB, solving a second. Finer maps
# are averaged.
_POSITIONS = 4096
_TINY = 1e-12


def label_parts(labels: Tensor, size: tuple[int, int], classes: int) -> Tensor:
    """How often each class is among the labels of each cell of a coarser grid.

    Args:
        labels: int64 (N, H, W), 255 = none.
        size: Rows h and columns w of the grid.
        classes: C.

    Returns:
        Counts float32 (N, C, h, w), 0 throughout where a cell has no label.
    """
    rows, columns = (
        torch.arange(side, device=labels.device) * cells // side
        for side, cells in zip(labels.shape[-2:], size, strict=True)
    )
    cell = rows[:, None] * size[1] + columns
    count, known = classes * size[0] * size[1], labels != IGNORE_INDEX
    parts = [
        torch.bincount(own[seen] * (size[0] * size[1]) + cell[seen], minlength=count)
        for own, seen in zip(labels, known, strict=True)
    ]
    return torch.stack(parts).reshape(len(labels), classes, *size).float()


def random_walk(maps: Tensor, feature: Tensor, given: Tensor, power: float, restart: float) -> Tensor:
    r"""Probabilities of classes by the labels of the same image.

    .. math:: x_i = (1 - restart) \sum_{j \ne i} w_{ij} x_j + restart \cdot q_i, \quad
        w_{ij} = softmax_j(power \cdot cos(f_i, f_j))

    for positions i without a label, and x_i = given_i at those with one; solved exactly.

    Args:
        maps: Probabilities q by a classifier (N, C, h, w).
        feature: f (N, D, h, w), of mean 0 over the data set.
        given: How much of the labels of a position is of each class (N, C, h, w), in any unit; all 0 at a position
            without any. An image without any label keeps `maps`.
        power: The larger, the more alike two positions have to be.
        restart: Chance of each step to end, in (0, 1].

    Returns:
        float32 (N, C, h, w), of sum 1.
    """
    size = (maps.shape[-2], maps.shape[-1])
    with torch.autocast(maps.device.type, enabled=False):
        maps, feature, given = maps.float(), feature.float(), given.float()
        while maps.shape[-2] * maps.shape[-1] > _POSITIONS:
            half = ((maps.shape[-2] + 1) // 2, (maps.shape[-1] + 1) // 2)
            maps, feature, given = (F.adaptive_avg_pool2d(part, half) for part in (maps, feature, given))
        walked = torch.stack(
            [
                _walk(own.flatten(1), F.normalize(like, dim=0).flatten(1), labels.flatten(1), power, restart)
                for own, like, labels in zip(maps, feature, given, strict=True)
            ]
        ).reshape(maps.shape)
        return F.interpolate(walked, size=size, mode="bilinear", align_corners=False)


def _walk(maps: Tensor, unit: Tensor, given: Tensor, power: float, restart: float) -> Tensor:
    """One image's: (C, n), (D, n), (C, n) to (C, n)."""
    total = given.sum(dim=0)
    known = total > 0
    free = ~known
    walked = torch.where(known, given / total.clamp(min=_TINY), maps)
    if not bool(known.any()) or not bool(free.any()):
        return walked
    odds = power * (unit.T[free] @ unit)
    # A walker does not stay: where nothing else is alike it would never arrive.
    odds[torch.arange(len(odds), device=odds.device), free.nonzero()[:, 0]] = -torch.inf
    step = (1 - restart) * odds.softmax(dim=1)
    ends = step[:, known] @ walked[:, known].T + restart * maps[:, free].T
    # Rows of `step` sum to less than 1, so that this is never singular.
    stay = torch.eye(len(step), device=step.device) - step[:, free]
    arrived = torch.linalg.solve(stay, ends).T.clamp(min=0)
    walked[:, free] = arrived / arrived.sum(dim=0).clamp(min=_TINY)
    return walked
