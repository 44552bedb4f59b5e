from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.data.synthetic import CLASSES, PALETTE, draw_scene, write_scenes
from training.data.synthetic.scene import Light, Placement, paint_object
from training.data.synthetic.shapes import CLUTTER, KINDS
from wsss_deploy.errors import DataError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=12, val=3, seed=5)


def canvas_and_mask(size=128):
    return np.full((size, size, 3), 0.5, np.float32), np.zeros((size, size), np.uint8)


def place(kind_name, x=64.0, y=64.0, radius=30.0, angle=0.0):
    kind = {kind.name: kind for kind in (*KINDS, *CLUTTER)}[kind_name]
    label = CLASSES.index(kind_name) if kind_name in CLASSES else 0
    return Placement(kind, label, x, y, radius, angle)


def paint(*placements, size=128):
    rng = np.random.default_rng(0)
    light = Light.draw(rng)
    canvas, mask = canvas_and_mask(size)
    for placement in placements:
        paint_object(rng, canvas, mask, placement, light)
    return canvas, mask


def test_a_seed_gives_one_scene_and_another_seed_another():
    first, again, other = (draw_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("size", [64, 128, 150])
def test_size_and_type(size):
    image, mask = draw_scene(np.random.default_rng(1), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (size, size)
    assert mask.max() < len(CLASSES)


@pytest.mark.parametrize("name", CLASSES[1:])
def test_the_mask_is_where_the_object_is_painted(name):
    canvas, mask = paint(place(name))
    assert set(np.unique(mask)) == {0, CLASSES.index(name)}
    area = np.count_nonzero(mask) / (np.pi * 30**2)
    assert 0.2 < area < 1.05
    # Shadows reach beyond the mask; the object itself does not: far from it nothing has changed.
    assert (canvas[:8] == 0.5).all()
    assert (canvas[mask > 0] != 0.5).any(axis=1).all()


def test_the_area_of_a_ball_is_that_of_its_circle():
    _, mask = paint(place("ball"))
    # The rasteriser counts pixels that an edge touches: about a quarter of a pixel all around.
    assert np.count_nonzero(mask) == pytest.approx(np.pi * (0.95 * 30) ** 2, rel=0.03)
    ys, xs = np.nonzero(mask)
    assert (xs.mean() + 0.5, ys.mean() + 0.5) == pytest.approx((64, 64), abs=0.15)


def test_the_ring_is_open_in_the_middle():
    _, mask = paint(place("ring"))
    assert mask[64, 64] == 0
    assert mask[64, 64 + 22] == CLASSES.index("ring")


def test_what_is_painted_later_lies_on_top():
    below, above = place("ball", x=54), place("crate", x=74)
    _, alone = paint(above)
    _, both = paint(below, above)
    crate = CLASSES.index("crate")
    # The outline of a crate varies; its centre part is always there.
    assert (both[54:74, 64:84] == crate).all()
    assert alone[64, 74] == crate
    _, reverse = paint(above, below)
    assert reverse[64, 64] == CLASSES.index("ball")


def test_clutter_belongs_to_the_background_and_can_cover_an_object():
    _, mask = paint(place("ball"), place("pebble", radius=12.0))
    assert mask[64, 64] == 0
    assert (mask == CLASSES.index("ball")).any()


def test_objects_may_reach_over_the_border():
    _, mask = paint(place("ball", x=0.0, y=128.0))
    assert mask[-1, 0] == CLASSES.index("ball")
    assert np.count_nonzero(mask) == pytest.approx(np.pi * (0.95 * 30) ** 2 / 4, rel=0.06)


def test_every_class_appears_and_the_contract_holds(scenes):
    source = open_dataset(scenes)
    assert source.classes == CLASSES
    assert len(CLASSES) >= 6
    assert source.palette == PALETTE
    assert {split: len(names) for split, names in source.splits.items()} == {"train": 12, "val": 3}
    seen = np.zeros(len(CLASSES), bool)
    for name in source.splits["train"]:
        mask, scribbles = source.load_labels(name, "masks"), source.load_labels(name, "scribbles")
        drawn = scribbles != 255
        assert (scribbles[drawn] == mask[drawn]).all()
        assert set(np.unique(scribbles[drawn])) == set(np.unique(mask))
        assert drawn.mean() < 0.1
        seen[np.unique(mask)] = True
    assert seen.all()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(scenes, tmp_path):
    small = write_scenes(tmp_path / "small", train=2, val=1, seed=5)
    for path in sorted(small.rglob("*.png")):
        assert path.read_bytes() == (scenes / path.relative_to(small)).read_bytes()


def test_another_seed_draws_other_scenes(scenes, tmp_path):
    other = write_scenes(tmp_path / "other", train=1, val=1, seed=6)
    image = Image.open(other / "images" / "train_0000.png")
    assert image.tobytes() != Image.open(scenes / "images" / "train_0000.png").tobytes()


def test_a_folder_with_something_in_it_is_refused(scenes):
    with pytest.raises(DataError, match="not an empty folder"):
        write_scenes(scenes, train=1, val=1)
