"""Tiles cover everything once, blend without seams, and need memory that does not grow with the image."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from wsss_deploy import Segmenter, tiling
from wsss_deploy.artifact import save_model
from wsss_deploy.card import Preprocessing, Sizing
from wsss_deploy.errors import ImageError, UsageError
from wsss_deploy.sizing import seen_size
from wsss_deploy.tiling import ArrayWindows, Tiling, seen_parts, starts

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 127, 128, 1000])
@pytest.mark.parametrize("overlap", [0, 1, 16, 32])
def test_windows_cover_a_side(length, overlap):
    firsts = starts(length, 64, overlap)
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    assert firsts[-1] + 64 >= length
    assert length < 64 or firsts[-1] + 64 == length
    for left, right in itertools.pairwise(firsts):
        assert left + 64 - right >= overlap


# The colour network looks at each pixel alone, so that tiles have to give the whole image's result everywhere.
@pytest.mark.parametrize("shape", [(40, 60), (64, 64), (65, 200), (200, 33), (150, 151), (1, 300)])
@pytest.mark.parametrize("budget", [1, tiling.SCORES_BYTES])
def test_tiles_give_the_whole_images_result(color_network, color_card, monkeypatch, shape, budget):
    monkeypatch.setattr(tiling, "SCORES_BYTES", budget)
    card = color_card.model_copy(update={"sizing": Sizing()})
    segmenter = Segmenter.from_network(color_network, card)
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    whole, tiled = segmenter.predict(image), segmenter.predict_tiled(image, Tiling(64, 16))
    np.testing.assert_allclose(tiled.confidence, whole.confidence, atol=1e-6)
    best = np.sort(whole.scores, axis=0)
    clear = best[-1] - best[-2] > 1e-6
    np.testing.assert_array_equal(tiled.mask[clear], whole.mask[clear])
    if max(shape) <= 64:
        np.testing.assert_array_equal(tiled.confidence, whole.confidence)
    with pytest.raises(UsageError, match="not the scores"):
        _ = tiled.scores
    assert tiled.overlay().size == shape[::-1]
    assert sum(entry.share for entry in tiled.legend()) == pytest.approx(1)


def test_a_step_between_windows_is_blended(color_card):
    """Where neighbours disagree, the score passes from one to the other without a jump."""

    class Disagreeing:
        card = color_card
        calls = 0

        def scores_of(self, windows):
            found = []
            for _ in windows:
                value = 0.4 if self.calls % 2 else 0.6
                self.calls += 1
                found.append(np.broadcast_to(np.array([[[1.0]], [[0]], [[0]]], np.float32) * value, (3, 1, 64)))
            return np.stack(found)

    image = ArrayWindows(np.zeros((1, 112, 3), np.uint8))
    (block,) = tiling.predict_blocks(Disagreeing(), image, Tiling(64, 16))
    assert block.confidence[0, 0] == pytest.approx(0.6)
    assert block.confidence[0, -1] == pytest.approx(0.4)
    assert np.abs(np.diff(block.confidence[0])).max() < 0.2 / 16


def test_memory_does_not_grow_with_the_image(color_network, color_card, monkeypatch):
    monkeypatch.setattr(tiling, "SCORES_BYTES", 3 * 4 * 64 * 128)
    segmenter = Segmenter.from_network(color_network, color_card)
    peaks = []
    for side in (512, 2048):

        class Synthetic:
            height, width = 128, side

            def read(self, top, left, height, width):
                return np.full((height, width, 3), (top + left) % 200, np.uint8)

        tracemalloc.start()
        covered = sum(block.mask.size for block in segmenter.predict_blocks(Synthetic(), Tiling(64, 16)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert covered == 128 * side
    assert peaks[1] - peaks[0] < 24 * (2048 - 512)  # the weights of the windows along the side, no scores


@pytest.mark.parametrize(("classes", "tile", "budget"), [(150, 128, 4), (21, 256, 12), (3, 64, 2), (2, 64, 64)])
def test_two_arrays_of_scores_are_held_at_most(color_card, monkeypatch, classes, tile, budget):
    monkeypatch.setattr(tiling, "SCORES_BYTES", budget * 2**20)

    class Scorer:
        card = color_card.model_copy(update={"classes": tuple(map(str, range(classes)))})

        def scores_of(self, windows):
            return np.full((len(windows), classes, *windows[0].shape[:2]), 1 / classes, np.float32)

    class Synthetic:
        height, width = 3 * tile, 12 * tile + 1

        def read(self, top, left, height, width):
            return np.zeros((height, width, 3), np.uint8)

    tracemalloc.start()
    for block in tiling.predict_blocks(Scorer(), Synthetic(), Tiling(tile, tile // 8)):
        np.testing.assert_allclose(block.confidence, 1 / classes, rtol=1e-5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    array = max(budget * 2**20, 4 * classes * tile * tile)
    assert peak < 2 * array + 60 * tile * tile + 2**21  # pixels of the windows, a plane or two, the block


def test_a_memory_map_is_read_by_windows(color_network, color_card, tmp_path):
    path = tmp_path / "image.raw"
    stored = np.memmap(path, np.uint8, "w+", shape=(100, 300, 3))
    stored[:, :150, 0] = 255
    stored[:, 150:, 1] = 255
    segmenter = Segmenter.from_network(color_network, color_card)
    out = np.full((100, 300), 9, np.uint8)
    for block in segmenter.predict_blocks(ArrayWindows(stored), Tiling(64, 16)):
        rows, columns = block.mask.shape
        out[block.top : block.top + rows, block.left : block.left + columns] = block.mask
    np.testing.assert_array_equal(out, stored.argmax(2))


def test_the_card_can_ask_for_tiles(color_network, color_card):
    card = color_card.model_copy(update={"sizing": Sizing(long_side=32, tile=64, overlap=8)})
    segmenter = Segmenter.from_network(color_network, card)
    large = RNG.integers(0, 256, (100, 80, 3), dtype=np.uint8)
    small, tiled = segmenter.predict_batch([large[:50, :50], large])
    assert small.scores.shape == (3, 50, 50)
    assert tiled.network_scores is None
    assert (tiled.mask == large.argmax(2)).mean() > 0.98  # equal channels are ties


def test_what_cannot_be_cut(color_network, color_card, tiny_network, tiny_card, tmp_path):
    with pytest.raises(UsageError, match="overlap is 40 pixels, expected 0 to 32"):
        Tiling(64, 40)
    with pytest.raises(ValueError, match="half of the tile"):
        Sizing(tile=64, overlap=40)
    with pytest.raises(ImageError, match="expected uint8"):
        ArrayWindows(np.zeros((4, 4, 3), np.float32))
    fixed = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=16, fixed_size=64)
    segmenter = Segmenter.from_network(color_network, color_card.model_copy(update={"preprocessing": fixed}))
    with pytest.raises(UsageError, match="takes at most 64"):
        segmenter.predict_tiled(np.zeros((80, 80, 3), np.uint8), Tiling(96, 16))
    save_model(tmp_path / "model.pt", tiny_card.model_copy(update={"preprocessing": fixed}), tiny_network.state_dict())
    with pytest.raises(UsageError, match=r"windows of 96 pixels, but model\.pt takes at most 64"):
        Segmenter(tmp_path / "model.pt", sizing=Sizing(tile=96, overlap=16))

    class Wrong:
        height = width = 100

        def read(self, top, left, height, width):
            return np.zeros((height, width), np.uint8)

    with pytest.raises(ImageError, match="the reader gave"):
        list(segmenter.predict_blocks(Wrong(), Tiling(64, 16)))


@pytest.mark.parametrize("shape", [(300, 200), (2000, 40), (64, 64), (48, 60), (65, 20)])
def test_exports_are_calibrated_and_compared_on_what_predict_sees(color_network, color_card, shape):
    card = color_card.model_copy(update={"sizing": Sizing(long_side=96, tile=64, overlap=16)})
    segmenter = Segmenter.from_network(color_network, card)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    run, seen = segmenter.runtime.run, set()

    def noting(images, refiner=None):
        seen.update(item.tobytes() for item in images)
        return run(images, refiner)

    segmenter.runtime.run = noting
    segmenter.predict(image)
    parts = list(seen_parts(image, card, 10**6))
    assert {part.tobytes() for part in parts} == seen
    assert {part.shape[:2] for part in parts} == {seen_size(*shape, card)}
    few = list(seen_parts(image, card, 3))
    assert len(few) == min(3, len(parts))
    assert {part.tobytes() for part in few} <= seen
