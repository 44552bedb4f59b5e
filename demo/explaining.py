"""What stands behind a result: a class's scores over the image, and the pixels that one pixel listens to; no gradio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from demo.colormap import colorize
from wsss_deploy.card import Refinement
from wsss_deploy.drawing import is_background
from wsss_deploy.pairwise import affinity
from wsss_deploy.pairwise.guides import make_guide

_MARK = 7
#: Small images are drawn larger, so that the mark does not hide what is around it.
_LEAST_SIDE = 720


def influence(image: npt.NDArray[np.uint8], settings: Refinement, row: int, column: int) -> npt.NDArray[np.float64]:
    """How much every pixel counts for the refined value of one.

    All steps of the refinement are one linear map; this is the row of its matrix that belongs to the pixel, so that
    the refined score of any class there is the sum of this times the class's scores.

    Args:
        image: What the network saw, uint8 (h, w, 3).
        settings: The refinement, without a mean-field form.
        row: Of the pixel.
        column: Of the pixel.

    Returns:
        (h, w); with normalised weights it adds up to 1.
    """
    height, width = image.shape[:2]
    parameters = settings.parameters
    weights = affinity(make_guide(image[None], settings.guide), parameters)[0].reshape(len(parameters.offsets), -1)
    down, across = np.asarray(parameters.offsets).T
    heard = np.zeros(height * width)
    heard[row * width + column] = 1.0
    for _ in range(parameters.iterations):
        pixels = np.flatnonzero(heard)
        rows = np.clip(pixels // width + down[:, None], 0, height - 1)
        columns = np.clip(pixels % width + across[:, None], 0, width - 1)
        told = weights[:, pixels] * heard[pixels]
        heard = np.bincount((rows * width + columns).ravel(), told.ravel(), minlength=height * width)
    return heard.reshape(height, width)


@dataclass(frozen=True)
class Listening:
    """The pixels that one pixel listens to.

    Attributes:
        picture: The image in grey with their influence in colours, RGB.
        pixels: So many of them make up 90 % of the influence.
        distance: Mean distance to them, weighted by influence, in pixels of the network's image.
    """

    picture: Image.Image
    pixels: int
    distance: float


def listening(
    shown: npt.NDArray[np.uint8], small: npt.NDArray[np.uint8], settings: Refinement, x: float, y: float
) -> Listening:
    """Draw which pixels one pixel listens to.

    Args:
        shown: The image to draw on, uint8 (H, W, 3).
        small: What the network saw, uint8 (h, w, 3).
        settings: The refinement.
        x: Place of the pixel from left to right, 0 to 1.
        y: From top to bottom.
    """
    height, width = small.shape[:2]
    row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
    heard = influence(small, settings, row, column)
    ordered = np.sort(heard.ravel())[::-1].cumsum()
    rows, columns = np.indices(heard.shape)
    distance = float((heard * np.hypot(rows - row, columns - column)).sum() / heard.sum())
    # The root makes the many small weights visible beside the few large ones.
    picture = tinted(enlarged(shown), np.sqrt(heard / heard.max()))
    _mark(picture, (column + 0.5) / width * picture.width, (row + 0.5) / height * picture.height)
    return Listening(picture, int(np.searchsorted(ordered, 0.9 * ordered[-1])) + 1, distance)


def enlarged(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image (H, W, 3) a whole number of times as large, at least about `_LEAST_SIDE` pixels long."""
    times = max(1, _LEAST_SIDE // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def tinted(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating]) -> Image.Image:
    """The image in dark grey, under colours where there is heat.

    Args:
        image: uint8 (H, W, 3).
        heat: (h, w) in [0, 1], of any size.
    """
    size = image.shape[1], image.shape[0]
    large = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    grey = Image.fromarray(image).convert("L").convert("RGB").point(lambda value: int(0.55 * value))
    return Image.composite(colorize(large), grey, Image.fromarray((40 + 190 * large).astype(np.uint8)))


def loudest_class(scores: npt.NDArray[np.float32], classes: tuple[str, ...]) -> int:
    """The class with the largest sum of scores (C, h, w), the background left out."""
    sums = scores.sum(axis=(1, 2))
    if is_background(classes[0]) and len(classes) > 1:
        sums[0] = -1
    return int(sums.argmax())


def _mark(picture: Image.Image, x: float, y: float) -> None:
    draw = ImageDraw.Draw(picture)
    for extent, color, line in ((_MARK + 1, "black", 4), (_MARK, "white", 2)):
        draw.ellipse((x - extent, y - extent, x + extent, y + extent), outline=color, width=line)
