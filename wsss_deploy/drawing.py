"""Overlays: an image tinted by class, with outlines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from wsss_deploy.card import palette_bytes
from wsss_deploy.errors import ImageError


def draw_overlay(
    image: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    opacity: float,
) -> Image.Image:
    """Tint an image by class and outline the regions; a class named "background" stays clear.

    Args:
        image: uint8 (H, W, 3).
        mask: Class ids, uint8 (H, W).
        classes: Names by id.
        palette: RGB by id.
        opacity: Of the tint, in [0, 1]; outlines are opaque.

    Returns:
        RGB image of that size.

    Raises:
        ImageError: The sizes differ, or the opacity is out of range.
    """
    if image.shape[:2] != mask.shape:
        raise ImageError(
            f"overlay: the image is {image.shape[1]} x {image.shape[0]}, the mask {mask.shape[1]} x {mask.shape[0]}; "
            "pass the image that was segmented, upright"
        )
    if not 0 <= opacity <= 1:
        raise ImageError(f"overlay: found opacity {opacity}, expected a number from 0 to 1")
    labels = Image.fromarray(mask)
    tinted = [0 if is_background(name) else 255 for name in classes]
    tinted += [0] * (256 - len(tinted))
    alpha = labels.point([round(value * opacity) for value in tinted])
    alpha.paste(255, mask=_outlines(mask, np.array(tinted, bool)))
    labels.putpalette(palette_bytes(palette))
    return Image.composite(labels.convert("RGB"), Image.fromarray(image), alpha)


def is_background(name: str) -> bool:
    """Whether a class is the rest of the image by its name, and so stays clear in overlays."""
    return name.strip("_ ").lower() in ("background", "bg")


def _outlines(mask: npt.NDArray[np.uint8], tinted: npt.NDArray[np.bool_]) -> Image.Image:
    """Mode-L image, 255 on pixels of tinted classes beside another class; thicker on large images."""
    edge = np.zeros(mask.shape, bool)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    outline = Image.fromarray(edge.astype(np.uint8) * 255)
    # At most 5: the filter takes time with the square of it, and nobody sees a whole huge image at full size.
    thickness = min(2 * (max(mask.shape) // 1500) + 1, 5)
    if thickness > 1:
        outline = outline.filter(ImageFilter.MaxFilter(thickness))
    visible = Image.fromarray(tinted[mask].astype(np.uint8) * 255)
    return Image.composite(outline, Image.new("L", outline.size), visible)
