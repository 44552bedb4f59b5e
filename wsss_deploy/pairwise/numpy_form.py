"""The operator in plain numpy, for machines without torch and without the compiled kernels.

The same definitions as `reference`, streamed over the offsets in the same way; no gradients.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsss_deploy.pairwise.parameters import GaussianTerm, PairwiseParameters, gaussian_cut_off

Floats = NDArray[np.floating]
_EPSILON = 1e-8
_LOWEST = -1e30


def affinity(guide: Floats, parameters: PairwiseParameters) -> Floats:
    """(N, G, H, W) to (N, K, H, W), see `reference.affinity`."""
    if guide.dtype.itemsize < 4:  # too coarse for 1e-8 and 1e30
        return affinity(guide.astype(np.float32), parameters).astype(guide.dtype)
    count = len(parameters.offsets)
    batch, _, height, width = guide.shape
    neighbours = _Neighbours(guide, parameters)
    weights = np.zeros((batch, count, height, width), guide.dtype)
    if parameters.kind == "gaussian":
        return _gaussian(guide, neighbours, weights, parameters)
    mean = np.zeros_like(guide)
    first = neighbours[0]
    for k in range(count):
        mean += neighbours[k] - first
    mean /= count
    squares = np.zeros_like(guide)
    for k in range(count):
        squares += (neighbours[k] - first - mean) ** 2
    factor = 1 / (np.sqrt(squares / (count - 1)) + _EPSILON) / parameters.contrast
    factor[squares == 0] = 0
    for k in range(count):
        weights[:, k] = -(((neighbours[k] - guide) * factor) ** 2).mean(1)
    _softmax(np.maximum(weights, _LOWEST, out=weights))
    if parameters.kind == "par":
        beta = np.asarray(parameters.position_weights(), guide.dtype)
        weights += (parameters.second * beta)[:, None, None]
    else:
        tau = np.empty_like(weights)
        for k in range(count):
            shifted, total = neighbours[k], np.zeros_like(guide)
            total[:, :, :-1] += (shifted[:, :, :-1] - shifted[:, :, 1:]) ** 2
            total[:, :, :, :-1] += (shifted[:, :, :, :-1] - shifted[:, :, :, 1:]) ** 2
            tau[:, k] = total.mean(1)
        weights -= parameters.second * _softmax(tau)
    weights *= parameters.scale
    return weights


def step(masks: Floats, weights: Floats, parameters: PairwiseParameters, unary: Floats | None = None) -> Floats:
    """(N, C, H, W) to (N, C, H, W), see `reference.step`."""
    if masks.dtype.itemsize < 4:
        wide = None if unary is None else unary.astype(np.float32)
        return step(masks.astype(np.float32), weights.astype(np.float32), parameters, wide).astype(masks.dtype)
    neighbours = _Neighbours(masks, parameters)
    total = np.zeros_like(masks)
    for k in range(len(parameters.offsets)):
        total += weights[:, k : k + 1] * neighbours[k]
    if parameters.mean_field is None or unary is None:
        return total
    total *= parameters.mean_field.compatibility
    total += unary
    return _softmax(total)


def refine(masks: Floats, guide: Floats, parameters: PairwiseParameters) -> Floats:
    """Masks of the guide's size, see `reference.refine`."""
    weights, unary = affinity(guide, parameters), unary_of(masks, parameters)
    for _ in range(parameters.iterations):
        masks = step(masks, weights, parameters, unary)
    return masks


def unary_of(masks: Floats, parameters: PairwiseParameters) -> Floats | None:
    """(N, C, H, W) logarithm of the scores for the mean-field form, None without it."""
    if parameters.mean_field is None:
        return None
    wide = masks.astype(np.float32) if masks.dtype.itemsize < 4 else masks
    unary: Floats = np.log(np.maximum(wide, np.asarray(parameters.mean_field.epsilon, wide.dtype))).astype(masks.dtype)
    return unary


def resize(masks: Floats, height: int, width: int) -> Floats:
    """Bilinear with aligned corners; (N, C, h, w) to (N, C, height, width)."""
    if masks.shape[2:] == (height, width):
        return masks
    for axis, size in ((2, height), (3, width)):
        last = masks.shape[axis] - 1
        position = np.arange(size) * (last / (size - 1) if size > 1 else 0.0)
        below = np.minimum(position.astype(np.int64), last)
        share = (position - below).astype(masks.dtype).reshape((-1, 1) if axis == 2 else (-1,))
        low, high = masks.take(below, axis), masks.take(np.minimum(below + 1, last), axis)
        masks = low + (high - low) * share
    return masks


class _Neighbours:
    """Item k is the view (N, C, H, W) of the values at clamp(p + o_k)."""

    def __init__(self, values: Floats, parameters: PairwiseParameters) -> None:
        reach = parameters.reach
        self.starts = [(reach + dy, reach + dx) for dy, dx in parameters.offsets]
        self.height, self.width = values.shape[2:]
        padding = ((0, 0), (0, 0), (reach, reach), (reach, reach))
        self.padded = np.pad(values, padding, mode="edge" if values.size else "constant")

    def __getitem__(self, k: int) -> Floats:
        top, left = self.starts[k]
        return self.padded[:, :, top : top + self.height, left : left + self.width]


def _softmax(values: Floats) -> Floats:
    """In place, over axis 1."""
    values -= values.max(1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(1, keepdims=True)
    return values


def _gaussian(guide: Floats, neighbours: _Neighbours, weights: Floats, parameters: PairwiseParameters) -> Floats:
    height, width = guide.shape[2:]
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    for k, (dy, dx) in enumerate(parameters.offsets):
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        square = (neighbours[k] - guide) ** 2
        for term in parameters.terms:
            weights[:, k] += _term(term, square, dy, dx)
        weights[:, k] *= inside
    if parameters.normalise:
        total = weights.sum(1, keepdims=True)
        weights /= np.where(total == 0, np.ones_like(total), total)
    return weights


def _term(term: GaussianTerm, square: Floats, dy: int, dx: int) -> Floats:
    exponent = np.zeros_like(square[:, 0])
    if term.sigma_xy is not None:
        exponent += (dy * dy + dx * dx) / term.sigma_xy**2
    if term.sigma_rgb is not None:
        exponent += square[:, :3].sum(1) / term.sigma_rgb**2
    if term.sigma_features is not None:
        exponent += square[:, 3:].sum(1) / term.sigma_features**2
    exponent *= -0.5
    weights: Floats = term.weight * np.where(exponent < gaussian_cut_off(exponent.itemsize), 0, np.exp(exponent))
    return weights.astype(square.dtype)
