"""Vector geometry and run lengths to pixels: polylines, polygons, COCO run-length codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage.draw import polygon as polygon_pixels


def resample(path: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """The same course in even steps of about `step` pixels.

    Args:
        path: (P, 2), at least one point.
        step: Distance of neighbours in the result.

    Returns:
        (Q, 2), at least two points (equal ones for a path without length).
    """
    steps = np.hypot(*np.diff(path, axis=0).T)
    along = np.concatenate([[0], np.cumsum(steps)])
    places = np.linspace(0, along[-1], max(2, round(along[-1] / step) + 1))
    return np.stack([np.interp(places, along, path[:, axis]) for axis in (0, 1)], axis=1)


def paint_discs(shape: tuple[int, int], centres: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Discs around points; parts outside the image are cut off.

    Args:
        shape: (H, W).
        centres: (P, 2) of y, x; pixel centres are at integers.
        radius: In pixels; 0 paints one pixel a point.

    Returns:
        (H, W), True in a disc.
    """
    pixels = np.unique(np.rint(centres).astype(int), axis=0)
    painted = np.zeros(shape, bool)
    reach = range(-int(np.ceil(radius)), int(np.ceil(radius)) + 1)
    for dy in reach:
        for dx in reach:
            # A little more than the radius: discs of 1 and 2 pixels look round, not like a diamond.
            if dy * dy + dx * dx <= radius * radius + 0.25 * radius:
                ys, xs = pixels[:, 0] + dy, pixels[:, 1] + dx
                inside = (ys >= 0) & (ys < shape[0]) & (xs >= 0) & (xs < shape[1])
                painted[ys[inside], xs[inside]] = True
    return painted


def draw_polyline(shape: tuple[int, int], points: ArrayLike, width: int) -> NDArray[np.bool_]:
    """A line through points with round ends and joints.

    Args:
        shape: (H, W).
        points: (P, 2) of x, y, at least one.
        width: In pixels, at least 1.

    Returns:
        (H, W), True on the line.
    """
    path = np.asarray(points, float)[:, ::-1]
    return paint_discs(shape, resample(path, 0.5), (width - 1) / 2)


def fill_polygon(shape: tuple[int, int], coordinates: Sequence[float]) -> NDArray[np.bool_]:
    """The pixels whose centres lie inside a polygon.

    Args:
        shape: (H, W).
        coordinates: x1, y1, x2, y2, ... with the image's corner at (0, 0), so that pixel centres are at halves.

    Returns:
        (H, W).
    """
    points = np.asarray(coordinates, float).reshape(-1, 2) - 0.5
    filled = np.zeros(shape, bool)
    filled[polygon_pixels(points[:, 1], points[:, 0], shape)] = True
    return filled


def decode_rle(counts: str | Sequence[int], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask from COCO's run lengths: column by column, unset pixels first.

    The compressed text codes each length, from the third on as the difference to the one two before, in groups of five
    bits plus a bit that says whether more follow, offset by 48; the last group's top bit is the sign.

    Args:
        counts: Lengths, or their compressed text.
        shape: (H, W).

    Returns:
        (H, W).

    Raises:
        ValueError: The lengths do not add up to H * W, or the text is no such code.
    """
    lengths = _decompress(counts) if isinstance(counts, str) else [int(count) for count in counts]
    total = shape[0] * shape[1]
    if any(length < 0 for length in lengths) or sum(lengths) != total:
        raise ValueError(f"run lengths add up to {sum(lengths)}, expected {shape[0]} x {shape[1]} = {total} pixels")
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return values.reshape(shape, order="F")


def _decompress(text: str) -> list[int]:
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"'{character}' is no character of a compressed run-length code")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the compressed run-length code is cut short")
    return lengths
