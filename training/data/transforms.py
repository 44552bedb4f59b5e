"""Geometry and colour of training samples, in numpy.

A crop is a window of the scaled image. Images are resampled, masks take the nearest pixel, and sparse labels have
their own rule: scaling down maps every labelled pixel to the cell it falls into, so that a scribble of one pixel or
a single point is still there at a quarter of the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_deploy.card import IGNORE_INDEX

# ITU-R BT.601 luma, which Pillow's grey conversion uses too.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_FROM_YIQ = np.linalg.inv(_TO_YIQ).astype(np.float32)


@dataclass(frozen=True)
class Window:
    """Where a square crop lies in the scaled image.

    Attributes:
        source: (height, width) of the image as it is.
        scaled: (height, width) of the whole image after scaling.
        corner: (y, x) of the crop's first pixel in the scaled image; negative where the crop begins outside it.
        size: Side of the crop in pixels.
    """

    source: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: int

    def span(self, axis: int) -> tuple[int, int, int]:
        """(first crop pixel inside the image, one past the last, first scaled pixel inside the crop) of an axis."""
        corner = self.corner[axis]
        first, start = max(-corner, 0), max(corner, 0)
        return first, first + min(self.scaled[axis] - start, self.size - first), start


def draw_window(
    source: tuple[int, int], size: int, scale: float, rng: np.random.Generator, place: tuple[float, float] | None = None
) -> Window:
    """A window at a random place.

    Along an axis that is longer than the crop the crop lies inside the image; along a shorter one the image lies
    inside the crop.

    Args:
        source: (height, width) of the image.
        size: Side of the crop.
        scale: Longer side of the scaled image in units of `size`.
        rng: Source of the place.
        place: Relative place (y, x) in [0, 1) instead of a random one.
    """
    factor = scale * size / max(source)
    scaled = (max(1, round(source[0] * factor)), max(1, round(source[1] * factor)))
    relative = rng.random(2) if place is None else np.asarray(place)
    free = np.array(scaled) - size
    corner = np.where(free >= 0, np.floor(relative * (free + 1)), -np.floor(relative * (1 - free))).astype(int)
    return Window(source, scaled, (int(corner[0]), int(corner[1])), size)


def crop_image(image: NDArray[np.uint8], window: Window, fill: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Scale and crop in one step, bilinear with antialiasing.

    Args:
        image: (H, W, 3).
        window: Its `source` is (H, W).
        fill: Colour outside the image.

    Returns:
        (S, S, 3).
    """
    (y0, y1, top), (x0, x1, left) = window.span(0), window.span(1)
    step_y, step_x = image.shape[0] / window.scaled[0], image.shape[1] / window.scaled[1]
    box = (left * step_x, top * step_y, (left + x1 - x0) * step_x, (top + y1 - y0) * step_y)
    # Rounding must not put the box outside of the image, which Pillow refuses.
    box = (box[0], box[1], min(box[2], image.shape[1]), min(box[3], image.shape[0]))
    out = np.empty((window.size, window.size, 3), np.uint8)
    out[:] = fill
    resized = Image.fromarray(image).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box)
    out[y0:y1, x0:x1] = np.asarray(resized)
    return out


def valid_area(window: Window) -> NDArray[np.bool_]:
    """(S, S), True inside the image."""
    (y0, y1, _), (x0, x1, _) = window.span(0), window.span(1)
    valid = np.zeros((window.size, window.size), bool)
    valid[y0:y1, x0:x1] = True
    return valid


def crop_dense(labels: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """Scale and crop a mask by nearest neighbour; 255 outside the image.

    Args:
        labels: (H, W).
        window: Its `source` is (H, W).

    Returns:
        (S, S).
    """
    (y0, y1, top), (x0, x1, left) = window.span(0), window.span(1)
    rows = _nearest(np.arange(top, top + y1 - y0), labels.shape[0], window.scaled[0])
    columns = _nearest(np.arange(left, left + x1 - x0), labels.shape[1], window.scaled[1])
    out = np.full((window.size, window.size), IGNORE_INDEX, np.uint8)
    out[y0:y1, x0:x1] = labels[rows[:, None], columns[None, :]]
    return out


def _nearest(scaled: NDArray[np.int64], source: int, total: int) -> NDArray[np.int64]:
    """Index of the source pixel under each scaled pixel's centre, in exact integer arithmetic."""
    return ((2 * scaled + 1) * source) // (2 * total)


def crop_scribbles(labels: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """Scale and crop scribbles: every labelled pixel survives scaling down; scaling up keeps their outline.

    Args:
        labels: (H, W).
        window: Its `source` is (H, W).

    Returns:
        (S, S).
    """
    if window.scaled[0] >= labels.shape[0] and window.scaled[1] >= labels.shape[1]:
        return crop_dense(labels, window)
    return crop_points(labels, window)


def crop_points(labels: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """Scale and crop points: every labelled pixel becomes one pixel, the cell that its centre falls into.

    Where several labels fall into one cell the most frequent wins; among equals the one with the fewest pixels in the
    whole map, so that a lone point is not lost to a long background scribble.

    Args:
        labels: (H, W).
        window: Its `source` is (H, W).

    Returns:
        (S, S).
    """
    out = np.full((window.size, window.size), IGNORE_INDEX, np.uint8)
    ys, xs = np.nonzero(labels != IGNORE_INDEX)
    values = labels[ys, xs].astype(np.int64)
    ys = _nearest(ys, window.scaled[0], labels.shape[0]) - window.corner[0]
    xs = _nearest(xs, window.scaled[1], labels.shape[1]) - window.corner[1]
    inside = (ys >= 0) & (ys < window.size) & (xs >= 0) & (xs < window.size)
    if not inside.any():
        return out
    total = np.bincount(values, minlength=256)
    keys, counts = np.unique((ys * window.size + xs)[inside] * 256 + values[inside], return_counts=True)
    cells, classes = keys // 256, keys % 256
    # The last write to a cell stays: the most frequent label, then the one that is rarer in the map.
    order = np.lexsort((-total[classes], counts))
    out.reshape(-1)[cells[order]] = classes[order]
    return out


def grow_points(labels: NDArray[np.uint8], radius: int, valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Turn points into discs; a pixel within reach of several points takes the nearest one's label.

    Args:
        labels: (H, W), 255 = unlabelled.
        radius: Of the discs, in pixels; 0 changes nothing.
        valid: (H, W), where discs may extend to.

    Returns:
        (H, W).
    """
    ys, xs = np.nonzero(labels != IGNORE_INDEX)
    if radius == 0 or not len(ys):
        return labels
    values, out = labels[ys, xs], labels.copy()
    height, width = labels.shape
    for dy, dx in _disc(radius):
        y, x = ys + dy, xs + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        out[y[inside], x[inside]] = values[inside]
    out[~valid] = IGNORE_INDEX
    return out


def _disc(radius: int) -> list[tuple[int, int]]:
    """Offsets (y, x) of a disc, the farthest first and the centre last, so that nearer points overwrite."""
    reach = range(-radius, radius + 1)
    offsets = [(y, x) for y in reach for x in reach if y * y + x * x <= radius * radius + radius * 0.5]
    return sorted(offsets, key=lambda offset: -(offset[0] ** 2 + offset[1] ** 2))


def colour_matrix(
    brightness: float, contrast: float, saturation: float, hue: float, mean: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Brightness, then contrast about the mean grey, then saturation and hue, as one affine map of RGB.

    Args:
        brightness: Factor.
        contrast: Factor.
        saturation: Factor.
        hue: Turn of the colour circle (in YIQ), 1 = full.
        mean: The image's mean grey in [0, 255].

    Returns:
        Matrix (3, 3) and offset (3,): `rgb @ matrix.T + offset`.
    """
    angle = 2 * np.pi * hue
    turn = np.array(
        [
            [1, 0, 0],
            [0, saturation * np.cos(angle), -saturation * np.sin(angle)],
            [0, saturation * np.sin(angle), saturation * np.cos(angle)],
        ],
        np.float32,
    )
    linear = _FROM_YIQ @ turn @ _TO_YIQ
    offset = np.full(3, brightness * mean * (1 - contrast), np.float32)
    # The offset is grey, which saturation and hue leave alone.
    return (linear * (brightness * contrast)).astype(np.float32), offset


def change_colours(
    image: NDArray[np.uint8], brightness: float, contrast: float, saturation: float, hue: float
) -> NDArray[np.uint8]:
    """Apply `colour_matrix` to an image (H, W, 3); values are clipped to [0, 255]."""
    # Every fourth pixel a side is enough for a mean.
    mean = float(image[::4, ::4].reshape(-1, 3).mean(0) @ _LUMA)
    matrix, offset = colour_matrix(brightness, contrast, saturation, hue, mean)
    # Pillow's affine colour conversion works on bytes: ten times as fast as a matrix product on floats.
    rows = np.concatenate([matrix, offset[:, None]], axis=1)
    return np.array(Image.fromarray(image).convert("RGB", tuple(rows.ravel().tolist())))
