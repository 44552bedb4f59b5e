"""Colours for numbers from 0 to 1."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Dark violet to light yellow in even steps of lightness: readable in grey and for colour-blind eyes, too.
ANCHORS = ((38, 12, 81), (87, 31, 124), (140, 41, 129), (197, 61, 106), (237, 104, 78), (251, 163, 89), (252, 236, 173))


def colorize(values: npt.NDArray[np.floating]) -> Image.Image:
    """Show numbers as colours, on a scale that is the same for every image.

    Args:
        values: In [0, 1], (H, W).

    Returns:
        RGB image of that size.
    """
    positions = np.linspace(0, 255, len(ANCHORS))
    anchors = np.asarray(ANCHORS, float)
    channels = [np.interp(np.arange(256), positions, anchors[:, channel]) for channel in range(3)]
    image = Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
    image.putpalette(np.rint(np.stack(channels, axis=1)).astype(np.uint8).tobytes())
    return image.convert("RGB")


def css_gradient() -> str:
    """The same colours as a CSS gradient, from left to right."""
    return f"linear-gradient(to right, {', '.join(f'rgb{color}' for color in ANCHORS)})"
