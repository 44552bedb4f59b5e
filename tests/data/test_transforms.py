"""Geometry: labels travel with the image, and sparse labels survive scaling down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.transforms import (
    Window,
    change_colours,
    colour_matrix,
    crop_dense,
    crop_image,
    crop_points,
    crop_scribbles,
    draw_window,
    grow_points,
    valid_area,
)

FILL = (9, 8, 7)


def whole(height: int, width: int, factor: float) -> Window:
    """A window that holds the whole image scaled by `factor`."""
    scaled = (max(1, round(height * factor)), max(1, round(width * factor)))
    return Window((height, width), scaled, (0, 0), max(scaled))


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(8, 64), scale=st.floats(0.2, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_labels_travel_with_the_image(height, width, size, scale, seed):
    rng = np.random.default_rng(seed)
    # A smooth image whose colours say where a pixel comes from; the mask holds the same in steps of 16.
    ys, xs = np.mgrid[:height, :width]
    image = np.stack([ys * 2, xs * 2, np.zeros_like(xs)], axis=2).astype(np.uint8)
    window = draw_window((height, width), size, scale, rng)
    crop, valid = crop_image(image, window, FILL), valid_area(window)
    rows, columns = crop_dense(image[:, :, 0], window), crop_dense(image[:, :, 1], window)
    assert crop.shape == (size, size, 3)
    assert (crop[~valid] == FILL).all()
    assert (rows[~valid] == 255).all()
    assert valid.any()
    inner = valid & (rows > 4) & (columns > 4) & (rows < 2 * height - 6) & (columns < 2 * width - 6)
    reach = 2 + 2 * max(height / window.scaled[0], width / window.scaled[1])
    assert np.abs(crop[inner][:, 0].astype(int) - rows[inner]).max(initial=0) <= reach
    assert np.abs(crop[inner][:, 1].astype(int) - columns[inner]).max(initial=0) <= reach


@given(
    height=st.integers(1, 200), width=st.integers(1, 200), scale=st.floats(0.05, 4), seed=st.integers(0, 99)
)  # fmt: skip
def test_windows_lie_on_the_image_or_hold_it(height, width, scale, seed):
    window = draw_window((height, width), 32, scale, np.random.default_rng(seed))
    for axis in (0, 1):
        first, last, start = window.span(axis)
        assert last - first == min(window.scaled[axis], 32)
        assert 0 <= first < last <= 32
        assert 0 <= start <= window.scaled[axis] - (last - first)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.25, 0.1])
def test_points_and_thin_scribbles_survive_scaling_down(factor):
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.full((97, 131), 255, np.uint8)
        for index in range(5):
            y, x = 20 * index, int(rng.integers(0, 131))
            labels[y, x] = index
        for crop in (crop_points, crop_scribbles):
            small = crop(labels, whole(97, 131, factor))
            assert set(np.unique(small)) == {0, 1, 2, 3, 4, 255}
            assert np.count_nonzero(small != 255) == 5
    line = np.full((97, 131), 255, np.uint8)
    line[40, 5:125] = 1
    small = crop_scribbles(line, whole(97, 131, factor))
    ys, xs = np.nonzero(small == 1)
    assert len(set(ys)) == 1
    assert np.array_equal(np.sort(xs), np.arange(xs.min(), xs.max() + 1)), "the line has no gaps"


def test_several_labels_in_a_cell():
    labels = np.full((8, 8), 255, np.uint8)
    labels[0, :3] = 0  # three background pixels against two of class 1: the majority
    labels[1, :2] = 1
    labels[4, 4:6] = 0  # two against two: the class with fewer pixels in the map
    labels[5, 4:6] = 2
    small = crop_points(labels, whole(8, 8, 0.25))
    assert small[0, 0] == 0
    assert small[1, 1] == 2


def test_scaling_up_keeps_points_small_and_scribbles_whole():
    labels = np.full((20, 20), 255, np.uint8)
    labels[10, 4:16] = 1
    window = whole(20, 20, 3)
    assert np.count_nonzero(crop_points(labels, window) == 1) == 12
    scribble = crop_scribbles(labels, window) == 1
    assert scribble.sum() == 12 * 9
    assert scribble[30:33, 12:48].all()


def test_grown_points_do_not_swallow_each_other():
    labels = np.full((30, 30), 255, np.uint8)
    labels[10, 10], labels[10, 12], labels[29, 0] = 1, 2, 3
    valid = np.ones((30, 30), bool)
    valid[:, 14:] = False
    grown = grow_points(labels, 4, valid)
    assert grown[10, 10] == 1
    assert grown[10, 12] == 2
    assert grown[10, 7] == 1
    assert grown[14, 12] == 2
    assert grown[10, 13] == 2
    assert (grown[~valid] == 255).all()
    assert grown[26, 0] == 3
    assert np.array_equal(grow_points(labels, 0, valid), labels)


def test_a_flip_of_the_crop_is_the_crop_of_the_flip():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    labels = rng.integers(0, 5, (40, 60)).astype(np.uint8)
    window = whole(40, 60, 0.5)
    flipped = crop_image(np.ascontiguousarray(image[:, ::-1]), window, FILL)
    assert np.abs(flipped[:20, :30].astype(int) - crop_image(image, window, FILL)[:20, :30][:, ::-1]).max() <= 1
    points = np.full((40, 60), 255, np.uint8)
    points[7, 9] = 3
    mirrored = crop_points(points[:, ::-1], window)[:20, :30]
    assert np.array_equal(mirrored, crop_points(points, window)[:20, :30][:, ::-1])
    assert crop_dense(labels, whole(40, 60, 1.0))[:40].tolist() == labels.tolist()


def test_colours_follow_their_matrix():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(change_colours(image, 1, 1, 1, 0), image)
    grey = change_colours(image, 1, 1, 0, 0).astype(int)
    assert np.abs(grey - grey[:, :, :1]).max() <= 1
    assert np.allclose(change_colours(image, 0.5, 1, 1, 0), image * 0.5, atol=0.51)
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert np.array_equal(change_colours(flat, 1, 1.3, 1.4, 0.2), flat), "contrast turns about the mean"
    matrix, offset = colour_matrix(1.1, 0.8, 1.2, 0.05, 120.0)
    luma = np.array([0.299, 0.587, 0.114])
    # Saturation and hue leave the luma alone, so only brightness and contrast act on it.
    assert np.allclose(luma @ matrix, 1.1 * 0.8 * luma, atol=1e-3)
    assert np.allclose(offset, 1.1 * 120 * 0.2)
