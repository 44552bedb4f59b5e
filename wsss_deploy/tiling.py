"""Images larger than the network's comfortable size: overlapping tiles, blended, in constant memory.

The image stays at its own size. Windows of `tile` pixels overlap; where they do, scores are averaged with weights that
fall linearly towards a window's inner borders, so that no seam is seen. Where one window holds the image, the result is
the whole image's, bit by bit; elsewhere a network that sees only its window differs near its borders by what it would
have made of what lies beyond. Finished parts leave as blocks.

What is held at a time does not depend on the image's size: two arrays of scores, of the strip that is worked on and of
the windows that go through the network together, each of at most `SCORES_BYTES` or of one window's scores
(4 x classes x tile^2 bytes), whichever is more. For that a wide image is worked off in columns, whose border windows
are computed twice. What the runtime needs for those windows comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from wsss_deploy.card import ModelCard
from wsss_deploy.errors import ImageError, UsageError
from wsss_deploy.sizing import is_cut, resized, seen_size
from wsss_deploy.upsampling import best_class

#: Bytes of one array of scores, unless one window's take more; two such arrays are alive.
SCORES_BYTES = 64 * 2**20
#: Pixels that go through the network together, unless one window has more.
WINDOW_PIXELS = 1_000_000

_Pixels = npt.NDArray[np.uint8]
_Scores = npt.NDArray[np.float32]


@runtime_checkable
class WindowReader(Protocol):
    """An image that is read by windows, for example a wrapped whole-slide or GeoTIFF file.

    Attributes:
        height: In pixels.
        width: In pixels.
    """

    height: int
    width: int

    def read(self, top: int, left: int, height: int, width: int) -> _Pixels:
        """RGB, uint8 (height, width, 3), of a window that lies inside the image."""
        ...


class WindowScorer(Protocol):
    """A model that sees windows at their own size: `Segmenter`, `TritonSegmenter`."""

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        ...

    def scores_of(self, windows: Sequence[_Pixels]) -> _Scores:
        """Class probabilities, float32 (N, C, H, W), of N windows of one size, uint8 (H, W, 3)."""
        ...


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Attributes:
        tile: Pixels a side of a window.
        overlap: Pixels that neighbouring windows share, at least; below half a tile.
    """

    tile: int = 512
    overlap: int = 64

    def __post_init__(self) -> None:
        if self.tile < 16:
            raise UsageError(f"tile is {self.tile} pixels, expected at least 16")
        if not 0 <= self.overlap <= self.tile // 2:
            raise UsageError(f"overlap is {self.overlap} pixels, expected 0 to {self.tile // 2}, half of the tile")


class Block(NamedTuple):
    """A finished part of a tiled prediction.

    Attributes:
        top: Its first row.
        left: Its first column.
        mask: Class ids, uint8 (h, w).
        confidence: The winning class's score, float32 (h, w).
    """

    top: int
    left: int
    mask: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32]


class ArrayWindows:
    """Windows of anything that is sliced like an array: `numpy.memmap`, zarr, h5py, tifffile's stores.

    Args:
        array: uint8 (H, W, 3), RGB; only the windows are read.

    Raises:
        ImageError: It has another shape or type.
    """

    def __init__(self, array: Any) -> None:
        shape, kind = tuple(array.shape), np.dtype(array.dtype)
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or kind != np.uint8:
            raise ImageError(f"found {kind} {shape}, expected uint8 (H, W, 3) in RGB; convert it, or write a reader")
        self._array = array
        self.height, self.width = shape[:2]

    def read(self, top: int, left: int, height: int, width: int) -> _Pixels:
        """RGB, uint8 (height, width, 3), of a window that lies inside the image."""
        return np.ascontiguousarray(self._array[top : top + height, left : left + width])


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of windows that cover a side: evenly spread, the last one ends with it.

    Args:
        length: Of the side.
        tile: Of a window.
        overlap: That neighbours share at least.
    """
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [index * (length - tile) // (count - 1) for index in range(count)]


def seen_parts(image: _Pixels, card: ModelCard, most: int) -> Iterator[_Pixels]:
    """What the network sees of an image, by its card's plan: the windows that it is cut into, or all of it, resized.

    Args:
        image: RGB, uint8 (H, W, 3).
        card: The model's card.
        most: Windows that are given at most, spread over the image.

    Yields:
        uint8 (h, w, 3) of `wsss_deploy.sizing.seen_size`.
    """
    tile, (height, width) = card.sizing.tile, image.shape[:2]
    if tile is None or not is_cut(height, width, card):
        yield resized(image, card)
        return
    high, wide = seen_size(height, width, card)
    rows, columns = (starts(side, tile, card.sizing.overlap) for side in (height, width))
    corners = [(top, left) for top in rows for left in columns]
    chosen = np.linspace(0, len(corners) - 1, min(most, len(corners))).round().astype(int)
    for top, left in (corners[index] for index in chosen):
        yield image[top : top + high, left : left + wide]


def predict_blocks(segmenter: WindowScorer, image: WindowReader, tiling: Tiling) -> Iterator[Block]:
    """Segment an image that is read by windows; parts are given as soon as they are finished.

    Args:
        segmenter: The model; its network sees every window at the window's own size.
        image: The image.
        tiling: How to cut it.

    Yields:
        Blocks that cover the image without gap or overlap, from top to bottom, one column of them after the other.

    Raises:
        ImageError: The reader gives something else than it was asked for.
        BackendError: The runtime failed.
    """
    high, wide = min(tiling.tile, image.height), min(tiling.tile, image.width)
    rows = _Axis(image.height, high, tiling.overlap)
    columns = _Axis(image.width, wide, tiling.overlap)
    # The last column is wider by what its windows share with no further ones.
    width = SCORES_BYTES // (4 * len(segmenter.card.classes) * high) - tiling.overlap
    together = max(1, width // max(1, wide - tiling.overlap))
    for first in range(0, len(columns.starts), together):
        last = first + together
        begin = columns.starts[first]
        end = columns.starts[last] if last < len(columns.starts) else image.width
        yield from _column(segmenter, image, rows, columns, (begin, end))


def joined(blocks: Iterable[Block], height: int, width: int) -> tuple[npt.NDArray[np.uint8], _Scores]:
    """Mask uint8 and confidence float32, (height, width), of the blocks of an image that fits into memory."""
    mask, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
    for block in blocks:
        rows = slice(block.top, block.top + block.mask.shape[0])
        columns = slice(block.left, block.left + block.mask.shape[1])
        mask[rows, columns], confidence[rows, columns] = block.mask, block.confidence
    return mask, confidence


def _column(
    segmenter: WindowScorer, image: WindowReader, rows: _Axis, columns: _Axis, part: tuple[int, int]
) -> Iterator[Block]:
    """The blocks of the image's columns [begin, end)."""
    begin, end = part
    classes, pixels = len(segmenter.card.classes), rows.tile * columns.tile
    needed = [i for i, left in enumerate(columns.starts) if left < end and left + columns.tile > begin]
    together = max(1, min(8, WINDOW_PIXELS // pixels, SCORES_BYTES // (4 * classes * pixels)))
    groups = [needed[first : first + together] for first in range(0, len(needed), together)]
    width_sum = columns.summed(begin, end)
    strip = np.zeros((classes, rows.tile, end - begin), np.float32)
    for index, top in enumerate(rows.starts):
        for group in groups:
            windows = [_read(image, top, columns.starts[number], rows.tile, columns.tile) for number in group]
            # The scores are nobody's when this returns: the next windows' are made while no others are held.
            _blend(segmenter.scores_of(windows), strip, rows.weights[index], columns, group, part)
        bottom = rows.starts[index + 1] if index + 1 < len(rows.starts) else top + rows.tile
        done = bottom - top
        finished = strip[:, :done]
        finished /= rows.summed(top, bottom)[:, None] * width_sum
        yield Block(top, begin, *best_class(finished, done, end - begin))
        for channel in strip:  # numpy copies what it moves within an array: one channel at a time
            channel[: rows.tile - done] = channel[done:]
            channel[rows.tile - done :] = 0


def _blend(
    scores: _Scores, strip: _Scores, row_weights: _Scores, columns: _Axis, numbers: list[int], part: tuple[int, int]
) -> None:
    """Add the weighted scores of a row's windows to the strip of the columns `part`."""
    begin, end = part
    for number, window in zip(numbers, scores, strict=True):
        left = columns.starts[number]
        low, high = max(left, begin), min(left + columns.tile, end)
        weights = row_weights[:, None] * columns.weights[number][low - left : high - left]
        for channel, found in zip(strip, window, strict=True):
            channel[:, low - begin : high - begin] += found[:, low - left : high - left] * weights


class _Axis:
    """Windows along one side, with the weights of each."""

    def __init__(self, length: int, tile: int, overlap: int) -> None:
        self.tile = tile
        self.starts = starts(length, tile, overlap)
        self.weights = [self._ramp(index) for index in range(len(self.starts))]

    def _ramp(self, index: int) -> _Scores:
        """1, falling linearly to just above 0 over what the window shares with its neighbours."""
        weights = np.ones(self.tile, np.float32)
        if index > 0:
            shared = self.starts[index - 1] + self.tile - self.starts[index]
            weights[:shared] = (np.arange(shared) + 1) / (shared + 1)
        if index + 1 < len(self.starts):
            shared = self.starts[index] + self.tile - self.starts[index + 1]
            weights[self.tile - shared :] *= np.arange(shared, 0, -1, dtype=np.float32) / (shared + 1)
        return weights

    def summed(self, begin: int, end: int) -> _Scores:
        """Sum of all windows' weights at the pixels [begin, end)."""
        total = np.zeros(end - begin, np.float32)
        for first, weights in zip(self.starts, self.weights, strict=True):
            low, high = max(first, begin), min(first + self.tile, end)
            if low < high:
                total[low - begin : high - begin] += weights[low - first : high - first]
        return total


def _read(image: WindowReader, top: int, left: int, height: int, width: int) -> _Pixels:
    pixels = image.read(top, left, height, width)
    if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
        raise ImageError(
            f"the reader gave {pixels.dtype} {pixels.shape} for the window at row {top}, column {left}, "
            f"expected uint8 {(height, width, 3)}"
        )
    return pixels
