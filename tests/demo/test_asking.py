"""Where a further stroke is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from demo.asking import outline, place_to_draw, with_strokes

SIZE = 96
NOTHING = np.zeros((SIZE, SIZE), bool)


def scores(*unsure: tuple[slice, slice]) -> np.ndarray:
    """Three classes; sure of the first but in these parts, where none is likelier."""
    found = np.zeros((3, SIZE, SIZE), np.float32)
    found[0] = 1
    for part in unsure:
        found[(slice(None), *part)] = 1 / 3
    return found


BLOCK = (slice(20, 40), slice(50, 75))


def test_the_place_is_what_is_unsure():
    place = place_to_draw(scores(BLOCK), NOTHING)
    assert place is not None
    inside = NOTHING.copy()
    inside[BLOCK] = True
    assert (place.area & inside).sum() / (place.area | inside).sum() > 0.8
    assert 20 / SIZE < place.center[0] < 40 / SIZE
    assert 50 / SIZE < place.center[1] < 75 / SIZE
    assert place.confidence == pytest.approx(1 / 3, abs=0.1)


def test_a_border_is_not_asked_about_while_there_is_an_area():
    # The line has more unsure cells than the block.
    line, block = (slice(None), slice(10, 12)), (slice(60, 72), slice(60, 72))
    place = place_to_draw(scores(line, block), NOTHING)
    assert place is not None
    assert place.area[66, 66]
    assert not place.area[:, :20].any()


def test_one_place_at_a_time():
    other = (slice(60, 75), slice(10, 25))
    place = place_to_draw(scores(BLOCK, other), NOTHING)
    assert place is not None
    assert place.area[BLOCK].any() != place.area[other].any()


def test_what_is_labelled_is_not_asked_about_again():
    labelled = NOTHING.copy()
    labelled[BLOCK] = True
    assert place_to_draw(scores(BLOCK), labelled) is None
    labelled[:, 60:] = False  # a stroke on one side of the block: the other side is left
    place = place_to_draw(scores(BLOCK), labelled)
    assert place is not None
    assert not place.area[:, :60].any()


def test_a_sure_image_is_not_asked_about():
    assert place_to_draw(scores(), NOTHING) is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 300), (500, 333)])
def test_any_size(shape):
    flat = np.full((4, *shape), 0.25, np.float32)
    labelled = np.zeros((shape[0] * 3, shape[1] * 2), bool)
    place = place_to_draw(flat, labelled)
    assert place is not None
    assert place.area.all()
    assert max(place.area.shape) <= 96
    assert all(0 < part < 1 for part in place.center)


def test_mirrored_with_the_image():
    found = scores(BLOCK)
    place, mirrored = place_to_draw(found, NOTHING), place_to_draw(found[:, :, ::-1].copy(), NOTHING)
    assert place is not None
    assert mirrored is not None
    np.testing.assert_array_equal(mirrored.area, place.area[:, ::-1])


def test_little_doubt_is_asked_about_and_less_is_not():
    found = scores()
    found[:, 20:40, 50:75] = np.array([0.7, 0.2, 0.1], np.float32)[:, None, None]
    place = place_to_draw(found, NOTHING)
    assert place is not None
    assert place.area[30, 60]
    found[:, 20:40, 50:75] = np.array([0.9, 0.05, 0.05], np.float32)[:, None, None]
    assert place_to_draw(found, NOTHING) is None


def visible(picture: np.ndarray) -> np.ndarray:
    assert picture.dtype == np.uint8
    return picture[..., 3] > 0


def test_the_outline_hides_nothing_inside():
    area = np.zeros((24, 32), bool)
    area[8:16, 10:22] = True
    picture = outline(area, (60, 80))
    assert picture.shape == (600, 800, 4)
    seen = visible(picture)
    assert not seen[230:370, 270:530].any()  # inside
    assert not seen[:150].any()
    assert not seen[:, :200].any()
    # Around the middle there is a white line between black ones.
    line = picture[300, :270][seen[300, :270]]
    assert {tuple(color) for color in line[:, :3].tolist()} == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("shape", [(60, 80), (16, 16), (1, 500), (3000, 4000)])
def test_the_outline_of_a_whole_image_is_seen(shape):
    seen = visible(outline(np.ones((24, 32), bool), shape))
    assert max(seen.shape) == 800
    edges = (seen[0], seen[-1], seen[:, 0], seen[:, -1])
    assert all(edge.mean() > 0.95 for edge in edges if len(edge) > 50)  # corners are cut
    assert seen.mean() < 0.06 or min(seen.shape) < 50


def test_the_outline_of_one_cell_is_seen():
    area = np.zeros((96, 96), bool)
    area[40, 95] = True
    assert visible(outline(area, (32, 32))).sum() > 50


def test_strokes_are_put_in_cell_by_cell():
    # Two cells; of the labels in a cell the last of the upper layer counts.
    scores_before = np.full((3, 1, 2), 1 / 3, np.float32)
    result = SimpleNamespace(network_scores=scores_before, image=np.zeros((4, 8, 3), np.uint8))
    below, above = np.full((4, 8), 255, np.uint8), np.full((4, 8), 255, np.uint8)
    below[:, :] = 1
    above[1, 6] = 2
    after = with_strokes(result, [below, above])
    assert after.argmax(axis=0).tolist() == [[1, 2]]
    np.testing.assert_array_equal(scores_before, np.full((3, 1, 2), np.float32(1 / 3)))
