"""Graphs of one size: which networks need it, and which size it is."""

from __future__ import annotations

import logging

from wsss_deploy.card import LARGEST_SIDE, ModelCard, Preprocessing
from wsss_deploy.errors import ExportError

#: Largest side, in pixels, of a graph of fixed size that neither a size nor a card's windows ask for.
FIXED_SIZE = 512

_log = logging.getLogger(__name__)


def with_fixed_size(card: ModelCard, size: int | None, source: str) -> ModelCard:
    """The card of a graph that pads to a size, or the card as it is.

    Args:
        card: The model's card.
        size: Pixels a side that were asked for; None leaves the size open where the encoder allows it.
        source: Name of the model file, for errors.

    Raises:
        ExportError: The size is no multiple of the network's stride, larger than a card allows, or smaller than its
            windows.
    """
    stride = card.preprocessing.stride
    largest = LARGEST_SIDE // stride * stride
    if size is not None and size > largest:
        raise ExportError(f"{source}: size {size} is too large, expected at most {largest}; pass a smaller --size")
    if size is not None and (size < stride or size % stride):
        near = min(max(stride, (size + stride // 2) // stride * stride), largest)
        raise ExportError(f"{source}: size {size} is no multiple of the network's stride {stride}; pass --size {near}")
    if size is None:
        # These pick their windows, and whether to shift them, by the image's size; a trace keeps the example's choice.
        if "swin" not in card.architecture.encoder or card.preprocessing.fixed_size is not None:
            return card
        # Windows keep their size: a graph that cannot take one is of no use.
        wanted = card.sizing.tile or min(card.sizing.long_side or card.sizing.max_long_side, FIXED_SIZE)
        size = min(-(-wanted // stride) * stride, largest)
        _log.info("This encoder works at one size only: images are padded to %d pixels a side (--size)", size)
    tile = card.sizing.tile or 0
    if tile > size:
        fitting = -(-tile // stride) * stride
        remedy = f"pass --size {fitting} or more" if fitting <= largest else "no size does; cut smaller windows"
        raise ExportError(
            f"{source}: its card cuts images into windows of {tile} pixels, which a graph of size {size} cannot take; "
            f"{remedy} (sizing.tile)"
        )
    # Built anew, not copied with a change, which pydantic would not look at.
    preprocessing = Preprocessing(**{**card.preprocessing.model_dump(), "fixed_size": size})
    return card.model_copy(update={"preprocessing": preprocessing})
