"""Weak labels simulated from masks: scribbles, points and tags, deterministic for a seeded generator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects
from skimage.measure import label

from training.data.rasterise import paint_discs
from training.data.strokes import draw_stroke
from wsss_deploy.card import IGNORE_INDEX

# A region below this share of the image is not marked, unless it is the largest of its class.
_SMALLEST_REGION = 0.0005


def simulate_scribbles(
    mask: NDArray[np.uint8], rng: np.random.Generator, length: float = 1.0, width: int = 3
) -> NDArray[np.uint8]:
    """One stroke through each region of a mask, as a person would draw it: along the middle, a bit unsteady.

    Every connected region gets a stroke, background and stuff too, except regions too small to bother with; each class
    that is present gets at least one. A shorter stroke is a part of the longer one for the same generator.

    Args:
        mask: (H, W) class ids, 255 = unknown.
        rng: Source of randomness.
        length: Share of the whole stroke that is drawn, about its middle; 0 leaves a dot.
        width: Of the pen, in pixels. A stroke never leaves its region, so it is thinner in thin regions.

    Returns:
        (H, W) class ids, 255 = unlabelled.
    """
    if not 0 <= length <= 1:
        raise ValueError(f"length is {length}, expected 0 to 1")
    out = np.full(mask.shape, IGNORE_INDEX, np.uint8)
    for index, box, region in _regions(mask):
        stroke = draw_stroke(region, rng)
        out[box][paint_discs(region.shape, _trim(stroke, length), (width - 1) / 2) & region] = index
    return out


def simulate_points(mask: NDArray[np.uint8], rng: np.random.Generator, radius: int = 0) -> NDArray[np.uint8]:
    """One click well inside each region of a mask; regions are those of `simulate_scribbles`.

    Args:
        mask: (H, W) class ids, 255 = unknown.
        rng: Source of randomness: clicks fall on the deeper half of a region, not exactly on its middle.
        radius: Of the dots, in pixels; 0 is one pixel. A dot never leaves its region.

    Returns:
        (H, W) class ids, 255 = unlabelled.
    """
    out = np.full(mask.shape, IGNORE_INDEX, np.uint8)
    for index, box, region in _regions(mask):
        depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        ys, xs = np.nonzero(depth >= 0.5 * depth.max())
        chosen = int(rng.integers(len(ys)))
        click = np.array([[ys[chosen], xs[chosen]]], float)
        out[box][paint_discs(region.shape, click, radius) & region] = index
    return out


def simulate_tags(mask: NDArray[np.uint8], has_background: bool = True) -> tuple[int, ...]:
    """Ids of the classes in a mask, ascending.

    Args:
        mask: (H, W) class ids, 255 = unknown.
        has_background: Class 0 is the background and is left out.
    """
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX])
    return tuple(int(index) for index in present if index or not has_background)


def _regions(mask: NDArray[np.uint8]) -> Iterator[tuple[int, tuple[slice, slice], NDArray[np.bool_]]]:
    """(class id, bounding box, (h, w) region inside the box) of every region worth a mark, in reading order."""
    numbers = label(mask, background=IGNORE_INDEX, connectivity=1)
    areas = np.bincount(numbers.ravel())
    boxes = find_objects(numbers)
    ids = [0] * (len(boxes) + 1)
    largest: dict[int, int] = {}
    for number, box in enumerate(boxes, start=1):
        row = numbers[box[0].start, box[1]]
        ids[number] = int(mask[box[0].start, box[1].start + int(np.argmax(row == number))])
        best = largest.get(ids[number])
        if best is None or areas[number] > areas[best]:
            largest[ids[number]] = number
    for number, box in enumerate(boxes, start=1):
        if areas[number] >= _SMALLEST_REGION * mask.size or largest[ids[number]] == number:
            yield ids[number], box, numbers[box] == number


def _trim(stroke: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    """The middle part of a stroke (P, 2) of evenly spaced points."""
    middle = (len(stroke) - 1) / 2
    half = length * middle
    if half < 0.5:
        return stroke[int(middle) : int(middle) + 1]
    return stroke[int(np.ceil(middle - half)) : int(np.floor(middle + half)) + 1]
