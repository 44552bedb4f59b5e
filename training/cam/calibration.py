"""Class probabilities of positions, calibrated by what a frozen encoder says of the same image; nothing is learnt.

Three published parts, in the form in which they need no training of the encoder: probabilities travel along attention
(affinity from attention, AFA, arXiv 2203.02664) and along the correlation of shared features, and prototypes of the
image's own classes vote once more (both from SFC, arXiv 2401.11719). docs/tags.md says what each of them adds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cam.prototypes import prototype_cosines, prototypes

# Cosines with prototypes become probabilities at this temperature.
_TEMPERATURE = 0.2
_TINY = 1e-6


def along_attention(maps: Tensor, logits: Tensor, share: float) -> Tensor:
    """Mix maps with what attention brings to each position from all others.

    Args:
        maps: Probabilities (N, C, h, w).
        logits: Attention before its softmax, scaled, (N, heads, n, n), n = h * w. Its softmax is averaged over heads
            and made symmetric; columns are divided by their sums.
        share: Of what attention brings, in [0, 1].

    Returns:
        (N, C, h, w).
    """
    if not share:
        return maps
    attention = torch.zeros_like(logits[:, 0], dtype=torch.float32)
    for head in logits.float().unbind(dim=1):  # one at a time: n * n is large
        attention += head.softmax(dim=-1) / logits.shape[1]
    return (1 - share) * maps + share * _carried(maps, attention + attention.transpose(1, 2))


def along_correlation(maps: Tensor, feature: Tensor, power: float, steps: int) -> Tensor:
    """Average maps over positions whose features are alike.

    `training.cam.prototypes.pixel_correlation` on a feature that nobody taught to tell classes apart: a power of the
    cosine above 1 does in its place.

    Args:
        maps: Probabilities (N, C, h, w).
        feature: (N, D, h, w), of mean 0 over the data set: features of a frozen encoder all point in about one
            direction, and what they differ by is what is left after it.
        power: Of the positive part of the cosine.
        steps: How often the average is taken.

    Returns:
        (N, C, h, w).
    """
    unit = F.normalize(feature, dim=1).flatten(2)
    similarity = (unit.transpose(1, 2) @ unit).relu().pow(power)
    for _ in range(steps):
        maps = _carried(maps, similarity)
    return maps


def with_prototypes(maps: Tensor, feature: Tensor, sure: float, weight: float) -> Tensor:
    """Mix maps with the similarity to the mean feature of each class's sure positions in the same image.

    Args:
        maps: Probabilities (N, C, h, w).
        feature: As in `along_correlation`.
        sure: Least probability of a position that a prototype is made from. A class without any keeps its own
            probabilities as they are; so do all others of its image, whose prototypes would share its positions.
        weight: Of the prototypes' probabilities beside 1 of the maps'.

    Returns:
        (N, C, h, w).
    """
    voted = prototype_maps(maps, feature, sure) if weight else None
    if voted is None:
        return maps
    found, whole = voted
    return torch.where(whole, (maps + weight * found) / (1 + weight), maps)


def prototype_maps(maps: Tensor, feature: Tensor, sure: float) -> tuple[Tensor, Tensor] | None:
    """Probabilities of classes by prototypes alone, and in which images every possible class has one (N, 1, 1, 1)."""
    value, best = maps.max(dim=1)
    possible = maps.amax(dim=(2, 3)) > 0
    seeds = F.one_hot(best, maps.shape[1]).movedim(-1, 1).to(maps.dtype) * (value > sure)[:, None]
    seen = seeds.amax(dim=(2, 3)) > 0
    if not bool(seen.any()):
        return None
    cosines = prototype_cosines(feature, prototypes(feature, seeds))
    scores = (cosines / _TEMPERATURE).masked_fill(~seen[:, :, None, None], -torch.inf)
    whole = (seen | ~possible).all(dim=1)[:, None, None, None]
    return scores.softmax(dim=1).nan_to_num(), whole


def _carried(maps: Tensor, weights: Tensor) -> Tensor:
    """Maps along (N, n, n) weights, whose columns are divided by their sums."""
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=_TINY)
    return (maps.flatten(2) @ weights).reshape(maps.shape)
