"""Simulated labels: on the mask, deterministic, growing with the asked length, every class marked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from training.data.dataset import open_dataset
from training.data.simulated import SimulatedSource
from training.data.weak import simulate_points, simulate_scribbles, simulate_tags
from wsss_deploy.errors import UsageError


def _mask() -> np.ndarray:
    ys, xs = np.mgrid[:120, :160]
    mask = np.zeros((120, 160), np.uint8)
    mask[(ys - 60) ** 2 / 4 + (xs - 50) ** 2 < 500] = 1
    mask[20:30, 100:150] = 2
    mask[50:110, 118] = 3  # one pixel thin
    mask[5, 5] = 4  # a single pixel, all there is of this class
    mask[80:90, 130:150] = 255
    return mask


def _scribbles(mask: np.ndarray, length: float = 1.0, seed: int = 0, width: int = 3) -> np.ndarray:
    return simulate_scribbles(mask, np.random.default_rng(seed), length, width)


@pytest.mark.parametrize("length", [0.0, 0.3, 1.0])
def test_scribbles_lie_on_their_class_and_reach_every_class(length):
    mask = _mask()
    scribbles = _scribbles(mask, length)
    drawn = scribbles != 255
    assert np.array_equal(scribbles[drawn], mask[drawn])
    assert set(np.unique(scribbles[drawn])) == {0, 1, 2, 3, 4}
    assert drawn.mean() < 0.1


def test_a_longer_scribble_holds_the_shorter_one():
    drawn = [_scribbles(_mask(), length) != 255 for length in (0, 0.2, 0.5, 0.8, 1)]
    for shorter, longer in pairwise(drawn):
        assert not (shorter & ~longer).any()
        assert longer.sum() > shorter.sum()
    for index in (1, 2):
        half, whole = ((d & (_mask() == index)).sum() for d in (drawn[2], drawn[4]))
        assert 0.4 < half / whole < 0.65


def test_scribbles_run_along_the_middle_for_most_of_the_region():
    mask = np.zeros((60, 200), np.uint8)
    mask[20:41, 10:190] = 1
    on = (_scribbles(mask, width=1) == 1) & (mask == 1)
    ys, xs = np.nonzero(on)
    assert xs.max() - xs.min() > 120
    depth = distance_transform_edt(mask == 1)
    assert depth[on].mean() > 7  # 11 on the middle line
    assert np.abs(ys - 30).max() <= 8


def test_a_round_region_gets_a_stroke():
    ys, xs = np.mgrid[:80, :80]
    mask = ((ys - 40) ** 2 + (xs - 40) ** 2 < 900).astype(np.uint8)
    ys, xs = np.nonzero(_scribbles(mask) == 1)
    assert np.hypot(np.ptp(ys), np.ptp(xs)) > 25


def test_seeds_decide():
    assert np.array_equal(_scribbles(_mask(), seed=3), _scribbles(_mask(), seed=3))
    assert not np.array_equal(_scribbles(_mask(), seed=3), _scribbles(_mask(), seed=4))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2), (40, 40)])
def test_any_shape_of_mask(shape):
    mask = np.ones(shape, np.uint8)
    assert (_scribbles(mask) == 1).any()
    assert (simulate_points(mask, np.random.default_rng(0)) == 1).sum() == 1
    nothing = np.full(shape, 255, np.uint8)
    assert (_scribbles(nothing) == 255).all()
    assert simulate_tags(nothing) == ()


def test_length_is_checked():
    with pytest.raises(ValueError, match="expected 0 to 1"):
        _scribbles(_mask(), length=1.5)


def test_points_lie_well_inside_and_are_one_a_region():
    mask = _mask()
    points = simulate_points(mask, np.random.default_rng(1))
    ys, xs = np.nonzero(points != 255)
    # Regions: background in two parts would count twice; here it is one, and four objects.
    assert sorted(points[ys, xs]) == [0, 1, 2, 3, 4]
    assert np.array_equal(points[ys, xs], mask[ys, xs])
    depth = distance_transform_edt(np.pad(mask == 1, 1))[1:-1, 1:-1]
    assert depth[points == 1].min() >= 0.5 * depth.max()
    dots = simulate_points(mask, np.random.default_rng(1), radius=3)
    assert np.array_equal(dots[ys, xs], points[ys, xs])
    assert np.array_equal(dots[dots != 255], mask[dots != 255])
    assert (dots == 1).sum() > 20


def test_tags_leave_out_the_background_only():
    assert simulate_tags(_mask()) == (1, 2, 3, 4)
    assert simulate_tags(_mask(), has_background=False) == (0, 1, 2, 3, 4)


def test_simulated_source_adds_what_is_missing_and_keeps_what_is_real(folder_set):
    real = open_dataset(folder_set)
    kept = real.load_labels("a", "scribbles")
    (folder_set / "scribbles" / "b.png").unlink()
    (folder_set / "scribbles" / "c.png").unlink()
    (folder_set / "masks" / "c.png").unlink()
    source = SimulatedSource(open_dataset(folder_set), "scribbles", seed=0)
    assert np.array_equal(source.load_labels("a", "scribbles"), kept)
    assert "scribbles" in source.kinds("b")
    assert "scribbles" not in source.kinds("c")
    made = source.load_labels("b", "scribbles")
    kept_copy, made_again = made.copy(), source.load_labels("b", "scribbles")
    made_again[:] = 0
    assert np.array_equal(source.load_labels("b", "scribbles"), kept_copy), "the kept labels are nobody's to change"
    again = SimulatedSource(open_dataset(folder_set), "scribbles", seed=0).load_labels("b", "scribbles")
    other = SimulatedSource(open_dataset(folder_set), "scribbles", seed=1).load_labels("b", "scribbles")
    assert np.array_equal(made, again)
    assert not np.array_equal(made, other)
    mask = source.load_labels("b", "masks")
    assert np.array_equal(made[made != 255], mask[made != 255])
    with pytest.raises(UsageError, match="cannot simulate masks"):
        SimulatedSource(source, "masks", 0)


def test_simulated_tags_and_points(folder_set):
    (folder_set / "tags.json").unlink()
    source = SimulatedSource(open_dataset(folder_set), "tags", seed=0)
    assert source.tags("a") == (1, 2)
    assert source.kinds("a") >= {"tags"}
    for path in (folder_set / "points").iterdir():
        path.unlink()
    points = SimulatedSource(open_dataset(folder_set), "points", seed=0).load_labels("a", "points")
    assert set(np.unique(points)) == {0, 1, 2, 255}


def test_real_masks_are_scribbled_quickly_and_truly(shared):
    import time

    source = SimulatedSource(open_dataset(shared / "data" / "camvid"), "scribbles", seed=0)
    names = source.splits["train"][::60]
    begin = time.process_time()
    made = [source.load_labels(name, "scribbles") for name in names]
    assert (time.process_time() - begin) / len(names) < 0.3
    for name, scribbles in zip(names, made, strict=True):
        mask, drawn = source.load_labels(name, "masks"), scribbles != 255
        assert np.array_equal(scribbles[drawn], mask[drawn])
        assert set(np.unique(mask)) - {255} == set(np.unique(scribbles)) - {255}
        assert 0.01 < drawn.mean() < 0.08
