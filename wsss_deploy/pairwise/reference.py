"""The operator in plain torch: what every faster form is tested against.

Differentiable, any float type and device, streamed over the K offsets: no tensor of size (N, C, K, H, W)
exists, because a neighbour is a view of the edge-padded input. Definitions: PAR of AFA (CVPR 2022), VARM of
TSCD (AAAI 2023), the kernel of Gated CRF (2019).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.pairwise.parameters import GaussianTerm, PairwiseParameters, gaussian_cut_off

_EPSILON = 1e-8
# Below this the softmax is zero anyway; it keeps a lone pixel in a flat patch (contrast 1e8) finite.
_LOWEST = -1e30


def affinity(guide: Tensor, parameters: PairwiseParameters) -> Tensor:
    """Weights of every pixel's neighbours.

    Args:
        guide: (N, G, H, W) floating; NaN or infinity makes every weight that depends on it NaN.
        parameters: Kind, neighbours, constants.

    Returns:
        (N, K, H, W), K in the order of `parameters.offsets`.
    """
    if guide.dtype.itemsize < 4:  # too coarse for 1e-8 and 1e30
        return affinity(guide.float(), parameters).to(guide.dtype)
    if parameters.kind == "gaussian":
        return _gaussian(guide, parameters)
    neighbours = _Neighbours(guide, parameters)
    count = len(parameters.offsets)
    # Differences to one neighbour: the variance is the same, small values lose no digits, and it is exactly 0 where all
    # neighbours are the same.
    first = neighbours[0]
    mean = _sum(neighbours[k] - first for k in range(count)) / count
    variance = _sum((neighbours[k] - first - mean) ** 2 for k in range(count)) / (count - 1)
    # There a channel's contrasts are all the same and cancel in the softmax, unless rounding of their 1e12 and more
    # swallows the other channels. (And the root's derivative at 0 is infinite.)
    flat = variance == 0
    deviation = torch.where(flat, 1, variance).sqrt()
    factor = torch.where(flat, 0, 1 / (deviation + _EPSILON) / parameters.contrast)
    contrast = [-(((neighbours[k] - guide) * factor) ** 2).mean(1) for k in range(count)]
    alpha = torch.stack(contrast, 1).clamp_min(_LOWEST).softmax(1)
    if parameters.kind == "par":
        beta = torch.tensor(parameters.position_weights(), dtype=guide.dtype, device=guide.device)
        return (alpha + parameters.second * beta[:, None, None]) * parameters.scale
    tau = torch.stack([_variation(neighbours[k]) for k in range(count)], 1).softmax(1)
    return (alpha - parameters.second * tau) * parameters.scale


def step(masks: Tensor, weights: Tensor, parameters: PairwiseParameters, unary: Tensor | None = None) -> Tensor:
    """m'(p) = sum_k w_k(p) m(clamp(p + o_k)), or softmax over channels of unary + compatibility * that sum.

    Args:
        masks: (N, C, H, W). NaN and infinity reach every pixel that has them as a neighbour.
        weights: (N, K, H, W) of `affinity`.
        parameters: Neighbours and the mean-field form.
        unary: (N, C, H, W), needed by the mean-field form only.

    Returns:
        (N, C, H, W).
    """
    if masks.dtype.itemsize < 4:
        wide = None if unary is None else unary.float()
        return step(masks.float(), weights.float(), parameters, wide).to(masks.dtype)
    neighbours = _Neighbours(masks, parameters)
    total = _sum(weights[:, k : k + 1] * neighbours[k] for k in range(len(parameters.offsets)))
    if parameters.mean_field is None or unary is None:
        return total
    return (unary + parameters.mean_field.compatibility * total).softmax(1)


def refine(masks: Tensor, guide: Tensor, parameters: PairwiseParameters) -> Tensor:
    """Affinity of the guide, then `parameters.iterations` steps on masks resized to the guide.

    Args:
        masks: (N, C, h, w).
        guide: (N, G, H, W).
        parameters: Everything else.

    Returns:
        (N, C, H, W).
    """
    masks = resize(masks, guide.shape[2], guide.shape[3])
    weights = affinity(guide, parameters)
    unary = unary_of(masks, parameters)
    for _ in range(parameters.iterations):
        masks = step(masks, weights, parameters, unary)
    return masks


def unary_of(masks: Tensor, parameters: PairwiseParameters) -> Tensor | None:
    """(N, C, H, W) logarithm of the scores for the mean-field form, None without it."""
    if parameters.mean_field is None:
        return None
    wide = masks.float() if masks.dtype.itemsize < 4 else masks
    return wide.clamp_min(parameters.mean_field.epsilon).log().to(masks.dtype)


def resize(masks: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with aligned corners, as published; (N, C, h, w) to (N, C, height, width)."""
    if tuple(masks.shape[2:]) == (height, width):
        return masks
    return F.interpolate(masks, size=(height, width), mode="bilinear", align_corners=True)


class _Neighbours:
    """Item k is the view (N, C, H, W) of the values at clamp(p + o_k)."""

    def __init__(self, values: Tensor, parameters: PairwiseParameters) -> None:
        self.offsets: Sequence[tuple[int, int]] = parameters.offsets
        self.reach = parameters.reach
        self.height, self.width = values.shape[2:]
        padded = (self.height + 2 * self.reach, self.width + 2 * self.reach)
        self.padded = (
            F.pad(values, (self.reach,) * 4, mode="replicate")
            if values.numel()
            else values.new_empty(*values.shape[:2], *padded)
        )

    def __getitem__(self, k: int) -> Tensor:
        top, left = (self.reach + o for o in self.offsets[k])
        return self.padded[:, :, top : top + self.height, left : left + self.width]


def _variation(shifted: Tensor) -> Tensor:
    """Squared forward differences of the shifted image, 0 on the last row and column; (N, H, W)."""
    down = F.pad((shifted[:, :, :-1] - shifted[:, :, 1:]) ** 2, (0, 0, 0, 1))
    right = F.pad((shifted[:, :, :, :-1] - shifted[:, :, :, 1:]) ** 2, (0, 1))
    return (down + right).mean(1)


def _gaussian(guide: Tensor, parameters: PairwiseParameters) -> Tensor:
    """Sum of the terms; neighbours outside the image have weight 0."""
    neighbours = _Neighbours(guide, parameters)
    height, width = guide.shape[2:]
    y = torch.arange(height, device=guide.device)[:, None]
    x = torch.arange(width, device=guide.device)[None, :]
    planes = []
    for k, (dy, dx) in enumerate(parameters.offsets):
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        square = (neighbours[k] - guide) ** 2
        total = _sum(_term(term, square, dy, dx) for term in parameters.terms)
        # Multiplied, not selected: a NaN of the guide has to stay visible.
        planes.append(total * inside)
    weights = torch.stack(planes, 1)
    if not parameters.normalise:
        return weights
    total = weights.sum(1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def _term(term: GaussianTerm, square: Tensor, dy: int, dx: int) -> Tensor:
    exponent = square.new_zeros(square.shape[0], *square.shape[2:])
    if term.sigma_xy is not None:
        exponent = exponent + (dy * dy + dx * dx) / term.sigma_xy**2
    if term.sigma_rgb is not None:
        exponent = exponent + square[:, :3].sum(1) / term.sigma_rgb**2
    if term.sigma_features is not None:
        exponent = exponent + square[:, 3:].sum(1) / term.sigma_features**2
    exponent = -0.5 * exponent
    return term.weight * torch.where(exponent < gaussian_cut_off(exponent.dtype.itemsize), 0, exponent.exp())


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of an iterable of tensors of one shape, without keeping them."""
    return functools.reduce(torch.add, tensors)
