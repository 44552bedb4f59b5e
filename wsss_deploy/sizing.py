"""The size at which the network sees an image."""

from __future__ import annotations

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
