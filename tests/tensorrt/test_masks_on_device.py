"""Masks of the images' own sizes from an engine: order in the streams, threads, memory; stand-ins for all of CUDA."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.patterns import pattern_image
from export.tensorrt_engine import build_engine, read_shapes
from wsss_deploy import Segmenter
from wsss_deploy import segmenter as segmenter_module
from wsss_deploy.backends.device_layer import Buffers
from wsss_deploy.card import Sizing
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.refinement import DEFAULT

SIZING = Sizing(long_side=64)
REFINE = pytest.mark.parametrize("refine", [False, DEFAULT], ids=["plain", "refined"])


@pytest.fixture
def engine(machine, tiny_onnx, tmp_path):
    path = tmp_path / "model.engine"
    build_engine(tiny_onnx, path, read_shapes("1x1x1/1x64x96/4x128x160"), "wsss-export")
    return path


def both(engine, onnx, refine):
    """From the engine, and in ONNX Runtime on the CPU."""
    ours = Segmenter(engine, refine=refine, sizing=SIZING)
    assert ours.describe()["masks"] == "on the device"
    return ours, Segmenter(onnx, device="cpu", threads=1, refine=refine, sizing=SIZING)


def agree(masks, images, theirs):
    for mask, image in zip(masks, images, strict=True):
        assert mask.shape == image.shape[:2]
        assert (mask == theirs.predict(image).mask).mean() > 0.995


@pytest.fixture
def lazy_kernels(lazy_machine, driver, monkeypatch):
    """Kernels run when their stream is waited for, as everything of `lazy_machine` does."""
    launch = driver.cuLaunchKernel

    def put(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        def do():
            driver.contexts.append("context 0")
            launch(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra)
            driver.contexts.pop()

        lazy_machine[-1].put(stream, "kernel", do)
        return (0,)

    monkeypatch.setattr(driver, "cuLaunchKernel", put)
    return lazy_machine


@REFINE
def test_kernels_follow_what_is_in_the_stream(lazy_kernels, engine, tiny_onnx, refine):
    ours, theirs = both(engine, tiny_onnx, refine)
    images = [pattern_image(60 + 2 * (seed % 5), 81 + 2 * (seed % 4), seed) for seed in range(18)]
    for _ in range(3):
        agree(ours.predict_masks(images), images, theirs)
    assert not lazy_kernels[-1].work, "nothing is left in a stream"


def test_threads_get_their_own_masks(engine, tiny_onnx, driver):
    ours, theirs = both(engine, tiny_onnx, DEFAULT)
    images = [pattern_image(60 + 7 * (seed % 5), 90 + 3 * (seed % 4), seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for image, masks in zip(images, pool.map(lambda i: ours.predict_masks([i, i]), images), strict=True):
            agree(masks, [image, image], theirs)


@REFINE
def test_without_memory_batches_are_halved(engine, tiny_onnx, machine, driver, caplog, refine):
    ours, theirs = both(engine, tiny_onnx, refine)
    layer, images = machine[-1], [pattern_image(300, 400, seed) for seed in range(4)]
    layer.most = 2 * 300 * 400 if refine is False else 2 * 4 * 32 * 48 * 64  # masks or weights of two images
    layer.downloaded.clear()
    agree(ours.predict_masks(images), images, theirs)
    assert layer.downloaded == [2 * 300 * 400] * 2, "masks alone"
    assert "A batch of 4 images does not fit into memory" in caplog.text


def test_an_image_without_memory_goes_by_its_scores(engine, tiny_onnx, machine, driver, caplog):
    ours, theirs = both(engine, tiny_onnx, False)
    layer, images = machine[-1], [pattern_image(300, 400, 0), pattern_image(60, 80, 1)]
    before, layer.most = layer.most, 4 * 4 * 48 * 64 * 2
    layer.downloaded.clear()
    agree(ours.predict_masks(images), images, theirs)
    assert layer.downloaded == [60 * 80, 4 * 4 * 48 * 64]
    assert "No room to make a mask on the GPU (TensorRT failed on cuda:0" in caplog.text
    layer.most = before
    layer.downloaded.clear()
    agree(ours.predict_masks(images), images, theirs)
    assert layer.downloaded == [300 * 400 + 60 * 80], "there is room again"


def test_buffers_go_when_the_stream_is_done_with_them(lazy_kernels, engine, tiny_onnx, monkeypatch):
    ours, _ = both(engine, tiny_onnx, False)
    layer, release, seen = lazy_kernels[-1], Buffers.release, []
    give = layer.device_buffer

    def little(count):
        if count == 96 * 128:  # the mask's
            raise BackendError("CUDA failed (cudaErrorMemoryAllocation)")
        return give(count)

    def noted(buffers):
        seen.append(sorted(layer.work))
        release(buffers)

    monkeypatch.setattr(layer, "device_buffer", little)
    monkeypatch.setattr(Buffers, "release", noted)
    ours.predict_masks([pattern_image(96, 128, 0)])
    assert seen
    assert not any(seen), "the network was in the stream when memory was found to be short"


def test_no_slot_is_waited_for_to_ask(engine, tiny_onnx, driver):
    ours, theirs = both(engine, tiny_onnx, False)
    asked = []

    class Counted:
        """The slots, which tells how often one was waited for."""

        def __init__(self, slots):
            self.slots = slots

        def get(self):
            asked.append(1)
            return self.slots.get()

        def __getattr__(self, name):
            return getattr(self.slots, name)

    ours.runtime._free = Counted(ours.runtime._free)
    images = [pattern_image(90, 120, 0)]
    agree(ours.predict_masks(images), images, theirs)
    assert len(asked) == 1, "for the mask itself"
    assert ours.predict_masks([]) == []


def test_images_that_are_cut_and_specks_go_by_their_scores(engine, tiny_onnx, machine, driver, monkeypatch):
    cut, theirs = (Segmenter(path, refine=False, sizing=Sizing(tile=64, overlap=16)) for path in (engine, tiny_onnx))
    monkeypatch.setattr(cut.runtime, "masks_at", None)
    image = pattern_image(90, 100, 0)
    np.testing.assert_array_equal(cut.predict_masks([image])[0], theirs.predict(image).mask)
    ours, theirs = both(engine, tiny_onnx, False)
    layer, speck = machine[-1], np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(segmenter_module, "MOST_REDUCED", 64 * 64 - 1)
    layer.downloaded.clear()
    np.testing.assert_array_equal(ours.predict_masks([speck])[0], theirs.predict(speck).mask)
    assert layer.downloaded == [4 * 4 * 64 * 64]
    monkeypatch.setattr(segmenter_module, "MOST_REDUCED", 64 * 64)
    layer.downloaded.clear()
    np.testing.assert_array_equal(ours.predict_masks([speck])[0], theirs.predict(speck).mask)
    assert layer.downloaded == [1]


def test_engines_of_many_images_at_least_give_scores(engine, tiny_onnx, driver):
    ours = Segmenter(engine, refine=False, sizing=SIZING)
    manifest = ours.runtime._manifest
    ours.runtime._manifest = manifest.model_copy(update={"shapes": read_shapes("4x1x1/4x64x96/4x128x160")})
    assert ours.describe()["masks"] == "on the host: the engine takes no single images"
    assert len(ours.predict_masks([pattern_image(90, 120, seed) for seed in range(4)])) == 4


def test_half_precision_scores_are_raised_on_the_host(engine, driver):
    ours = Segmenter(engine, refine=False, sizing=SIZING)
    for _ in range(2):
        slot = ours.runtime._free.get()
        slot._types["scores"] = np.dtype(np.float16)
        ours.runtime._free.put(slot)
    assert ours.describe()["masks"] == "on the host: the engine's scores are float16"


def test_an_engine_of_other_classes_is_told(engine, driver):
    ours = Segmenter(engine, refine=False, sizing=SIZING)
    for _ in range(2):
        slot = ours.runtime._free.get()
        slot._classes = 7
        ours.runtime._free.put(slot)
    for method in (ours.predict_masks, ours.predict_batch):
        with pytest.raises(ArtifactError, match="the engine gives 4 classes, its card names 7; export it again"):
            method([pattern_image(90, 120, 0)])


def test_a_mask_holds_its_own_memory_alone(engine, driver):
    ours = Segmenter(engine, refine=False, sizing=SIZING)
    for height in (90, 48):  # of another size than the network's, and of its own
        for mask in ours.predict_masks([pattern_image(height, 64, seed) for seed in range(4)]):
            while mask.base is not None:
                mask = mask.base
            assert mask.nbytes == height * 64
