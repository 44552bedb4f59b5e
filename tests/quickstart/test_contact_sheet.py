from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.contact_sheet import COLUMNS, SheetRow, contact_sheet

CLASSES = ("background", "square")
PALETTE = ((120, 120, 120), (250, 20, 30))


def row(height=60, width=60):
    image = np.full((height, width, 3), (10, 200, 90), np.uint8)
    truth = np.zeros((height, width), np.uint8)
    truth[10:50, 10:50] = 1
    weak = np.full((height, width), 255, np.uint8)
    weak[28:32, 20:40] = 1
    return SheetRow(image=image, weak=weak, prediction=np.zeros_like(truth), truth=truth)


def panel_centers(sheet, rows):
    """(rows, 4, 3): colour in the middle of every panel, found from the sheet's own symmetry."""
    pixels = np.asarray(sheet)
    panel, gap, margin, top = 240, 8, 28, 28 + 76 + 30
    xs = [margin + column * (panel + gap) + panel // 2 for column in range(len(COLUMNS))]
    ys = [top + index * (panel + gap) + panel // 2 for index in range(rows)]
    return np.array([[pixels[y, x] for x in xs] for y in ys]).astype(int)


def reddish(color):
    return color[0] > color[1] + 60 and color[0] > color[2] + 60


def grey(color):
    return max(color) - min(color) <= 2


@pytest.mark.parametrize("count", [1, 3])
def test_size_and_contents(count):
    sheet = contact_sheet([row()] * count, CLASSES, PALETTE, "title", "caption")
    assert sheet.mode == "RGB"
    assert sheet.width == 2 * 28 + 4 * 240 + 3 * 8
    assert sheet.height - contact_sheet([row()], CLASSES, PALETTE, "t", "c").height == (count - 1) * 248
    for image, weak, prediction, truth in panel_centers(sheet, count):
        assert np.abs(image - (10, 200, 90)).max() <= 2
        assert np.abs(weak - PALETTE[1]).max() <= 2
        assert grey(prediction)  # background: the grey image shows
        assert reddish(truth)


def test_titles_and_legend_are_drawn():
    sheet = np.asarray(contact_sheet([row()], CLASSES, PALETTE, "title", "caption")).astype(int)
    legend = sheet[28 + 76 + 30 + 248 :]
    for color in PALETTE:
        assert (np.abs(legend - color).max(-1) == 0).sum() > 100
    dark = (sheet[:134].max(-1) < 60).any(0)
    for column in range(4):
        assert dark[28 + column * 248 : 28 + column * 248 + 60].any()


@pytest.mark.parametrize("shape", [(30, 60), (500, 100)])
def test_images_of_other_shapes_keep_their_proportions(shape):
    sheet = np.asarray(contact_sheet([row(*shape)], CLASSES, PALETTE, "t", "c")).astype(int)
    first = sheet[134 : 134 + 240, 28 : 28 + 240]
    green = np.abs(first - (10, 200, 90)).max(-1) <= 3
    height, width = np.any(green, 1).sum(), np.any(green, 0).sum()
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.05)
    assert max(height, width) >= 236


def test_a_long_legend_says_how_many_are_left_out():
    classes = [f"a rather long class name {index}" for index in range(40)]
    palette = [(index * 5, 100, 200) for index in range(40)]
    short = contact_sheet([row()], classes[:3], palette[:3], "t", "c")
    full = contact_sheet([row()], classes, palette, "t", "c")
    assert full.size == short.size


def test_activation_maps_make_a_panel_of_their_own():
    plain = row()
    maps = np.zeros((len(PALETTE), *plain.truth.shape), np.float32)
    maps[1] = 1
    sheet = contact_sheet([replace(plain, maps={"CAM": maps})], CLASSES, PALETTE, "t", "c")
    assert sheet.width - contact_sheet([plain], CLASSES, PALETTE, "t", "c").width == 248
    panel = np.asarray(sheet)[254, 28 + 248 + 120]
    np.testing.assert_array_equal(panel, PALETTE[1])
