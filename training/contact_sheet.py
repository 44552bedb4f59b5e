"""The contact sheet: a few images side by side with their weak labels, predictions and ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wsss_deploy.card import IGNORE_INDEX

COLUMNS = ("Image", "Weak label", "Prediction", "Ground truth")
_PANEL, _GAP, _MARGIN = 240, 8, 28
_HEADER, _TITLES, _LEGEND = 76, 30, 64
_PAPER, _INK, _FAINT = (250, 250, 248), (28, 32, 40), (104, 112, 124)


@dataclass(frozen=True)
class SheetRow:
    """One image of the sheet; all arrays have the image's height and width.

    Attributes:
        image: uint8 (H, W, 3).
        weak: uint8 (H, W) class ids, 255 = unlabelled.
        prediction: uint8 (H, W) class ids.
        truth: uint8 (H, W) class ids, 255 = unlabelled.
        maps: Per title of a further column, maps of classes such as CAMs, float (C, H, W) in [0, 1], the first of
            which is not shown.
    """

    image: NDArray[np.uint8]
    weak: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    maps: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def contact_sheet(
    rows: Sequence[SheetRow],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str,
    caption: str,
) -> Image.Image:
    """Draw the sheet: a title, one row of panels per image, a legend.

    Args:
        rows: The images, from top to bottom; all of them have the same `maps`, which come after the image.
        classes: Class names; class 0 is the background, which stays an image in the panels.
        palette: One RGB colour per class.
        title: First line.
        caption: Second line, smaller.

    Returns:
        RGB image.
    """
    columns = [COLUMNS[0], *(rows[0].maps if rows else ()), *COLUMNS[1:]]
    width = 2 * _MARGIN + len(columns) * (_PANEL + _GAP) - _GAP
    top = _MARGIN + _HEADER + _TITLES
    height = top + len(rows) * (_PANEL + _GAP) + _LEGEND + _MARGIN // 2
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, _INK, _font(30))
    draw.text((_MARGIN, _MARGIN + 38), caption, _FAINT, _font(16))
    for column, name in enumerate(columns):
        x = _MARGIN + column * (_PANEL + _GAP)
        draw.text((x, top - 28), name, _INK, _font(18))
        for index, row in enumerate(rows):
            sheet.paste(_panel(row, name, palette), (x, top + index * (_PANEL + _GAP)))
    _draw_legend(draw, classes, palette, top + len(rows) * (_PANEL + _GAP) + 20, width)
    return sheet


def _panel(row: SheetRow, column: str, palette: Sequence[Sequence[int]]) -> Image.Image:
    if column == "Image":
        picture = row.image
    elif column in row.maps:
        maps = row.maps[column][1:]
        strongest = maps.argmax(axis=0).astype(np.uint8) + 1
        picture = _tint(row.image, strongest, palette, maps.max(axis=0)[..., None], clear=None)
    elif column == "Weak label":
        picture = _tint(row.image, row.weak, palette, opacity=1.0, clear=None)
    else:
        labels = row.prediction if column == "Prediction" else row.truth
        picture = _tint(row.image, labels, palette, opacity=0.82, clear=0)
    height, width = picture.shape[:2]
    scale = _PANEL / max(height, width)
    size = (round(width * scale), round(height * scale))
    # Labels stay sharp when they grow; photographs that are larger than a panel are averaged.
    method = Image.Resampling.LANCZOS if column == "Image" or scale < 1 else Image.Resampling.BICUBIC
    panel = Image.new("RGB", (_PANEL, _PANEL), _PAPER)
    panel.paste(Image.fromarray(picture).resize(size, method), ((_PANEL - size[0]) // 2, (_PANEL - size[1]) // 2))
    return panel


def _tint(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    palette: Sequence[Sequence[int]],
    opacity: float | NDArray[np.float32],
    clear: int | None,
) -> NDArray[np.uint8]:
    """The image in pale grey, coloured where there are labels other than `clear`; uint8 (H, W, 3)."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    pale = np.broadcast_to(0.45 * grey + 128, image.shape)
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = palette
    colored = opacity * table[labels] + (1 - opacity) * grey
    shown = (labels != IGNORE_INDEX) & (labels != (IGNORE_INDEX if clear is None else clear))
    return np.where(shown[..., None], colored, pale).round().astype(np.uint8)


def _draw_legend(
    draw: ImageDraw.ImageDraw, classes: Sequence[str], palette: Sequence[Sequence[int]], y: int, width: int
) -> None:
    """Swatches with names from left to right; names that do not fit into two lines are left out with a mark."""
    font, x, line = _font(16), _MARGIN, 0
    for index, name in enumerate(classes):
        advance = 24 + int(draw.textlength(name, font)) + 20
        if x + advance > width - _MARGIN:
            x, line = _MARGIN, line + 1
        if line == 2:
            draw.text((width - _MARGIN, y + 24), f"… {len(classes) - index} more", _FAINT, font, anchor="ra")
            break
        draw.rounded_rectangle((x, y + 24 * line, x + 16, y + 24 * line + 16), 4, tuple(palette[index]))
        draw.text((x + 24, y + 24 * line - 2), name, _INK, font)
        x += advance


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
