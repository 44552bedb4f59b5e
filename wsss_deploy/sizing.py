"""What the network sees of an image: at which size, and whether whole or in windows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.card import ModelCard


def network_size(height: int, width: int, card: ModelCard) -> tuple[int, int]:
    """The size to which an image is resized before it goes into the network.

    With `card.sizing.long_side`, the longer side becomes about that many pixels, whether this enlarges or reduces.
    Without it, the image keeps its size unless its longer side exceeds `max_long_side`; then that is the target.
    With `card.sizing.tile`, larger images are cut (`wsss_deploy.tiling`) and those up to it keep their size, so that
    the network sees all of them at the same scale.
    Where the preprocessing has a `fixed_size`, neither exceeds it.
    Whenever the size changes, both sides become the nearest multiple of the network's stride, at least one stride;
    `max_long_side` is never exceeded unless one stride already does. A size that is kept is not rounded: the network
    pads to its stride by itself and crops the result. The aspect ratio therefore changes a little, which thin
    images (1 x 5000) feel most and which the result's way back to the image's size undoes.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        card: The model's card; `sizing` and the stride of its preprocessing are used.

    Returns:
        (height, width) in pixels.
    """
    sizing, stride = card.sizing, card.preprocessing.stride
    longer = max(height, width)
    largest = card.preprocessing.fixed_size or 10**9
    kept = sizing.tile or (sizing.max_long_side if sizing.long_side is None else 0)
    if longer <= min(kept, largest):
        return height, width
    target = min(sizing.long_side or sizing.max_long_side, largest)
    most = largest if sizing.long_side else min(sizing.max_long_side, largest)

    def side(pixels: int) -> int:
        # Halves go up, not to even (as round() would), so that equal sides of different images stay comparable.
        strides = int(pixels * target / (longer * stride) + 0.5)
        return min(max(strides, 1), max(most // stride, 1)) * stride

    return side(height), side(width)


def is_cut(height: int, width: int, card: ModelCard) -> bool:
    """Whether an image goes into the network in windows (`wsss_deploy.tiling`), not whole.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        card: The model's card.
    """
    return card.sizing.tile is not None and max(height, width) > card.sizing.tile


def seen_size(height: int, width: int, card: ModelCard) -> tuple[int, int]:
    """The size of what goes into the network of an image: of each window where it is cut, else `network_size`.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        card: The model's card.

    Returns:
        (height, width) in pixels.
    """
    tile = card.sizing.tile
    if tile is not None and is_cut(height, width, card):
        return min(tile, height), min(tile, width)
    return network_size(height, width, card)


def resized(image: npt.NDArray[np.uint8], card: ModelCard) -> npt.NDArray[np.uint8]:
    """An image at its `network_size`; the very array where that is its own.

    Args:
        image: RGB, uint8 (H, W, 3).
        card: The model's card.

    Returns:
        uint8 (h, w, 3).
    """
    height, width = network_size(image.shape[0], image.shape[1], card)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
