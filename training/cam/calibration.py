"""Class probabilities of positions, calibrated by what a frozen encoder says of the same image; nothing is learnt.

Three published parts, in the form in which they need no training of the encoder: probabilities travel along attention
(affinity from attention, AFA, arXiv 2203.02664) and along the correlation of shared features, and prototypes of the
image's own classes vote once more (both from SFC, arXiv 2401.11719). What they add: docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cam.prototypes import prototype_cosines, prototypes

# Cosines with prototypes become probabilities at this temperature.
_TEMPERATURE = 0.2
_TINY = 1e-6
# Positions whose weights to all others are there at a time.
_BLOCK = 1024


def along_attention(maps: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], scale: float, share: float) -> Tensor:
    """Mix maps with what attention brings to each position from all others.

    Attention is averaged over heads and layers, made symmetric, and its columns are divided by their sums. It is
    never there as a whole: memory grows with the positions, not with their square.

    Args:
        maps: Probabilities (N, C, h, w).
        pairs: Of each layer queries and keys, (N, heads, n, d) each, n = h * w.
        scale: Factor of their product before the softmax.
        share: Of what attention brings, in [0, 1].

    Returns:
        float32 (N, C, h, w).
    """
    if not share:
        return maps
    with torch.autocast(maps.device.type, enabled=False):
        flat = maps.float().flatten(2)
        there, back = torch.zeros_like(flat), torch.zeros_like(flat)
        received = flat.new_zeros(len(flat), flat.shape[2])
        heads = sum(query.shape[1] for query, _ in pairs)
        for queries, keys in pairs:
            for query, key in zip(queries.float().unbind(1), keys.float().unbind(1), strict=True):
                for rows in _blocks(flat.shape[2]):
                    attention = (scale * query[:, rows] @ key.transpose(1, 2)).softmax(dim=-1) / heads
                    there += flat[..., rows] @ attention
                    back[..., rows] += flat @ attention.transpose(1, 2)
                    received += attention.sum(dim=1)
        # Of the transpose every column sums to 1.
        carried = (there + back) / (received + 1)[:, None]
        return ((1 - share) * flat + share * carried).reshape(maps.shape)


def along_correlation(maps: Tensor, feature: Tensor, power: float, steps: int) -> Tensor:
    """Average maps over positions whose features are alike.

    `training.cam.prototypes.pixel_correlation` on a feature that nobody taught to tell classes apart: a power of the
    cosine above 1 does in its place. Memory grows with the positions, not with their square.

    Args:
        maps: Probabilities (N, C, h, w).
        feature: (N, D, h, w), of mean 0 over the data set: features of a frozen encoder all point in about one
            direction, and what they differ by is what is left after it. A position whose feature is zero is like
            no other and keeps its probabilities.
        power: Of the positive part of the cosine.
        steps: How often the average is taken; 0 gives the maps.

    Returns:
        float32 (N, C, h, w).
    """
    with torch.autocast(maps.device.type, enabled=False):
        unit = F.normalize(feature.float(), dim=1).flatten(2)
        flat, alone = maps.float().flatten(2), (unit == 0).all(dim=1, keepdim=True)
        for _ in range(steps):
            parts = []
            for columns in _blocks(flat.shape[2]):
                alike = (unit.transpose(1, 2) @ unit[..., columns]).relu_().pow_(power)
                parts.append(flat @ alike / alike.sum(dim=1, keepdim=True).clamp(min=_TINY))
            flat = torch.where(alone, flat, torch.cat(parts, dim=2))
        return flat.reshape(maps.shape)


def with_prototypes(maps: Tensor, feature: Tensor, seeds: float, fusion: float) -> Tensor:
    """Mix maps with the similarity to the mean feature of each class's sure positions in the same image.

    Args:
        maps: Probabilities (N, C, h, w).
        feature: As in `along_correlation`.
        seeds: Least probability of a position that a prototype is made from. An image in which a possible class has
            none stays as it is: the prototypes of the others would share its positions among them.
        fusion: Weight of the prototypes' probabilities beside 1 of the maps'.

    Returns:
        float32 (N, C, h, w).
    """
    voted = prototype_maps(maps, feature, seeds) if fusion else None
    if voted is None:
        return maps
    found, whole = voted
    return torch.where(whole, (maps.float() + fusion * found) / (1 + fusion), maps.float())


def prototype_maps(maps: Tensor, feature: Tensor, seeds: float) -> tuple[Tensor, Tensor] | None:
    """Probabilities of classes by prototypes alone, and in which images every possible class has one.

    Args:
        maps: Probabilities (N, C, h, w).
        feature: As in `along_correlation`.
        seeds: As in `with_prototypes`.

    Returns:
        float32 (N, C, h, w), 0 for classes without a prototype, and bool (N, 1, 1, 1). None: no image has any.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps, feature = maps.float(), feature.float()
        value, best = maps.max(dim=1)
        possible = maps.amax(dim=(2, 3)) > 0
        chosen = F.one_hot(best, maps.shape[1]).movedim(-1, 1).to(maps.dtype) * (value >= seeds)[:, None]
        seen = chosen.amax(dim=(2, 3)) > 0
        if not bool(seen.any()):
            return None
        cosines = prototype_cosines(feature, prototypes(feature, chosen))
        scores = (cosines / _TEMPERATURE).masked_fill(~seen[:, :, None, None], -torch.inf)
        whole = (seen | ~possible).all(dim=1)[:, None, None, None]
        # An image without any prototype has nothing but minus infinity.
        return scores.softmax(dim=1).nan_to_num(), whole


def _blocks(count: int) -> Iterator[slice]:
    """Positions in blocks."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))
