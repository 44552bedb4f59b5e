"""Polylines, polygons and COCO's run lengths."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.rasterise import decode_rle, draw_polyline, fill_polygon


@pytest.mark.parametrize(("width", "pixels"), [(1, 11), (3, 37), (5, 65)])
def test_a_line_has_its_width(width, pixels):
    drawn = draw_polyline((20, 30), [(5, 10), (15, 10)], width)
    assert drawn[:, 10].sum() == width
    assert abs(int(drawn.sum()) - pixels) <= 4


def test_lines_have_no_gaps_and_stay_on_the_image():
    drawn = draw_polyline((20, 20), [(-5, 3), (25, 17)], 1)
    assert drawn.any(axis=0).all()
    assert draw_polyline((20, 20), [(4, 6)], 1).sum() == 1


def test_a_polygon_takes_the_pixels_whose_centres_are_inside():
    filled = fill_polygon((8, 8), [2, 1, 5, 1, 5, 4, 2, 4])
    expected = np.zeros((8, 8), bool)
    expected[1:4, 2:5] = True
    assert np.array_equal(filled, expected)
    assert fill_polygon((8, 8), [-3, -3, 20, -3, 20, 20, -3, 20]).all()


def test_plain_run_lengths_go_down_columns():
    mask = decode_rle([1, 2, 3], (2, 3))
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_compressed_run_lengths_equal_the_reference():
    reference = pytest.importorskip("pycocotools.mask", reason="needs pycocotools as the reference")
    rng = np.random.default_rng(0)
    for sharp in (0.1, 0.5, 0.9):
        mask = np.kron(rng.random((7, 9)) < sharp, np.ones((13, 17))).astype(np.uint8)
        code = reference.encode(np.asfortranarray(mask))
        assert np.array_equal(decode_rle(code["counts"].decode(), mask.shape), mask == 1)


def test_a_compressed_code_by_hand():
    # Lengths 5, 40, 5, 14: 40 needs two groups (8 and 1, 32 times as much), the fourth is 14 - 40 = -26.
    text = "5" + "X1" + "5" + "VO"
    expected = np.repeat([False, True, False, True], [5, 40, 5, 14])
    assert np.array_equal(decode_rle(text, (8, 8)).ravel(order="F"), expected)


@pytest.mark.parametrize(("counts", "message"), [([3], "add up to 3"), ("5X", "cut short"), ("5 ", "no character")])
def test_bad_codes(counts, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(counts, (8, 8))
