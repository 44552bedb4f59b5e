"""Where on an image a further stroke is asked for: what the model is least sure of, with the strokes so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import WsssError
from wsss_deploy.refinement import STRONG, Refiner
from wsss_deploy.segmentation import Segmentation

#: Score of the class that a stroke names, before it spreads along the image.
_STROKE_SCORE = 0.98
#: Cells along the longer side of the grid on which places are looked for; a finger's width on a screen.
_CELLS = 96
#: Of the smoothing that tells areas from borders, in cells: a border is unsure along a line, whatever the model.
_SMOOTHING = 2.0
#: Cells around a label that are not asked about again.
_AROUND = 3
#: Of the picture of an outline: pixels of its longer side, and of its line.
_OUTLINE_SIDE, _OUTLINE_WIDTH = 800, 6
#: Mean uncertainty (1 - confidence) about a place from which on it is worth asking.
_LEAST = 0.15


class Place(NamedTuple):
    """Where to draw.

    Attributes:
        area: The place, bool (rows, columns) on a grid that is laid over the image.
        center: Its least sure spot as parts of height and width, in (0, 1).
        confidence: Mean confidence over the area, in [0, 1].
    """

    area: npt.NDArray[np.bool_]
    center: tuple[float, float]
    confidence: float


def with_strokes(result: Segmentation, strokes: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """The scores of a model after strokes were put in and spread along the image.

    Args:
        result: What the model made of the image.
        strokes: Labels uint8 (H, W) of the image's size, 255 = none; later ones lie on top.

    Returns:
        Probabilities float32 (C, h, w) at the network's size.

    Raises:
        WsssError: The image was cut into tiles, whose scores are not kept.
    """
    if result.network_scores is None:
        raise WsssError("this model cuts such large images into tiles; strokes cannot be spread along them")
    scores = result.network_scores.copy()
    count, height, width = scores.shape
    # One label a cell first: writing every pixel's scores would take seconds where a photograph is full of labels.
    cells = np.full((height, width), IGNORE_INDEX, np.uint8)
    for labels in strokes:
        rows, columns = np.nonzero(labels != IGNORE_INDEX)
        cells[rows * height // labels.shape[0], columns * width // labels.shape[1]] = labels[rows, columns]
    down, across = np.nonzero(cells != IGNORE_INDEX)
    if not len(down):
        return scores
    scores[:, down, across] = (1 - _STROKE_SCORE) / (count - 1)
    scores[cells[down, across], down, across] = _STROKE_SCORE
    small = np.asarray(Image.fromarray(result.image).resize((width, height), Image.Resampling.BILINEAR))
    spread: npt.NDArray[np.float32] = Refiner(STRONG, threads=1)(scores[None], small[None])[0]
    return spread


def place_to_draw(scores: npt.NDArray[np.float32], labelled: npt.NDArray[np.bool_]) -> Place | None:
    """The area that the scores are least sure of, away from labels.

    Uncertainty is smoothed, so that areas count and borders, unsure along a line, hardly do; the area is what is
    connected with its peak and at least half as unsure.

    Args:
        scores: Probabilities float32 (C, h, w).
        labelled: Whether a pixel has a label, bool (H, W).

    Returns:
        None where the image is sure enough everywhere.
    """
    unsure = 1 - scores.max(axis=0)
    scale = min(1.0, _CELLS / max(unsure.shape))
    rows, columns = (max(1, round(side * scale)) for side in unsure.shape)
    cells = np.asarray(Image.fromarray(unsure).resize((columns, rows), Image.Resampling.BOX))
    near = np.zeros((rows, columns), bool)
    at = np.nonzero(labelled)
    near[at[0] * rows // labelled.shape[0], at[1] * columns // labelled.shape[1]] = True
    near = _dilated(near, _AROUND)
    smooth = np.where(near, 0.0, _smoothed(cells))
    top = np.unravel_index(int(smooth.argmax()), smooth.shape)
    if smooth[top] < _LEAST:
        return None
    area = _connected(smooth >= 0.5 * smooth[top], (int(top[0]), int(top[1])))
    center = ((int(top[0]) + 0.5) / rows, (int(top[1]) + 0.5) / columns)
    return Place(area, center, float(1 - cells[area].mean()))


def outline(area: npt.NDArray[np.bool_], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A line around a place, white between black, on nothing.

    Args:
        area: See `Place`.
        shape: Height and width of the image.

    Returns:
        RGBA, uint8 (height, width, 4) of the image's proportions, 800 pixels along the longer side whatever the image
        has, so that the line is as wide for all.
    """
    scale = _OUTLINE_SIDE / max(shape)
    height, width = (max(_OUTLINE_WIDTH * 2 + 1, round(side * scale)) for side in shape)
    drawn = Image.fromarray(area.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    inside = np.zeros((height, width), bool)
    # Where the place ends with the image its line still lies on the image.
    within = slice(_OUTLINE_WIDTH, -_OUTLINE_WIDTH)
    inside[within, within] = np.asarray(drawn)[within, within] > 127
    picture = np.zeros((height, width, 4), np.uint8)
    black, white, nothing = (0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 0)
    for reach, color in ((_OUTLINE_WIDTH, black), (_OUTLINE_WIDTH - 1, white), (1, black), (0, nothing)):
        picture[_dilated(inside, reach)] = color
    return picture


def _smoothed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Gaussian smoothing; at the image's edge of what is inside."""
    reach = round(3 * _SMOOTHING)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTHING) ** 2)
    total, weight = values.astype(np.float64), np.ones(values.shape)
    for axis in (0, 1):
        total, weight = (
            np.apply_along_axis(lambda line: np.convolve(line, kernel)[reach:-reach], axis, part)
            for part in (total, weight)
        )
    smooth: npt.NDArray[np.float64] = total / weight
    return smooth


def _dilated(cells: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """Grown by a cell in four directions, so many times."""
    for _ in range(steps):
        grown = cells.copy()
        grown[1:] |= cells[:-1]
        grown[:-1] |= cells[1:]
        grown[:, 1:] |= cells[:, :-1]
        grown[:, :-1] |= cells[:, 1:]
        cells = grown
    return cells


def _connected(cells: npt.NDArray[np.bool_], start: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The part that is connected with a cell."""
    found = np.zeros_like(cells)
    found[start] = True
    while True:
        grown = _dilated(found, 1) & cells
        if np.array_equal(grown, found):
            return found
        found = grown
