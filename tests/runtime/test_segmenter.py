from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from wsss_deploy import Segmenter, segmenter
from wsss_deploy.card import Sizing
from wsss_deploy.errors import ArtifactError, BackendError, ImageError, UsageError

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
STAGES = ["pre", "inference", "refinement", "post"]


def strongest(image: np.ndarray) -> np.ndarray:
    return image.argmax(2)


@pytest.fixture(params=["torch", "onnxruntime"])
def any_segmenter(request, color_network, color_card, color_onnx):
    if request.param == "torch":
        return Segmenter.from_network(color_network, color_card)
    pytest.importorskip("onnxruntime")
    return Segmenter(color_onnx, device="cpu", threads=1)


def test_predict(any_segmenter, picture, color_card):
    result = any_segmenter.predict(picture)
    np.testing.assert_array_equal(result.mask, strongest(picture))
    np.testing.assert_array_equal(result.image, picture)
    assert result.scores.shape == (3, 40, 60)
    np.testing.assert_allclose(result.scores.sum(0), 1, atol=1e-5)
    expected = np.exp(8) / (np.exp(8) + 2)
    np.testing.assert_allclose(result.confidence, expected, rtol=1e-5)
    assert list(result.timing) == STAGES
    assert all(result.timing[stage] > 0 for stage in ("pre", "inference", "post"))
    assert result.timing["refinement"] == 0
    assert result.classes == color_card.classes
    assert result.palette == color_card.palette
    assert any_segmenter.card == color_card


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (17, 31), (300, 200), (1000, 1300)])
def test_the_mask_has_the_images_size(any_segmenter, shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[..., 2] = 255
    result = any_segmenter.predict(image)
    assert result.mask.shape == result.confidence.shape == shape
    assert (result.mask == 2).all()


def test_after_exif_orientation(color_segmenter, picture):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(buffer, "PNG", exif=exif)
    result = color_segmenter.predict(buffer.getvalue())
    np.testing.assert_array_equal(result.mask, np.rot90(strongest(picture), -1))


def test_every_input_gives_the_same_mask(color_segmenter, picture, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    planes = torch.from_numpy(picture).permute(2, 0, 1)
    for source in (path, str(path), path.read_bytes(), path.open("rb"), Image.open(path), planes, planes / 255):
        np.testing.assert_array_equal(color_segmenter.predict(source).mask, strongest(picture))


def test_batches_keep_the_order_and_the_results(any_segmenter, monkeypatch):
    monkeypatch.setattr(segmenter, "BATCH_PIXELS", 2 * 32 * 32)
    shapes = [(32, 32), (20, 50), (32, 32), (1, 1), (32, 32), (20, 50), (300, 600), (600, 1200)]
    images = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    results = any_segmenter.predict_batch(images)
    assert len(results) == len(images)
    for image, result in zip(images, results, strict=True):
        alone = any_segmenter.predict(image)
        np.testing.assert_array_equal(result.image, image)
        np.testing.assert_allclose(result.network_scores, alone.network_scores, atol=1e-6)
        np.testing.assert_array_equal(result.mask, alone.mask)
        assert list(result.timing) == STAGES
    assert any_segmenter.predict_batch([]) == []


def test_equal_sizes_go_through_the_network_together(color_segmenter, monkeypatch):
    seen = []
    run = color_segmenter._backend.run
    monkeypatch.setattr(
        color_segmenter._backend, "run", lambda images, refiner: seen.append(images.shape) or run(images, refiner)
    )
    color_segmenter.predict_batch([np.zeros((9, 8, 3), np.uint8), np.zeros((5, 5), np.uint8)] * 3)
    assert seen == [(3, 9, 8, 3), (3, 5, 5, 3)]


def test_a_bad_image_of_a_batch_is_named(color_segmenter):
    with pytest.raises(ImageError, match=r"image 2 of 2: array of shape \(3, 4, 5\)"):
        color_segmenter.predict_batch([np.zeros((4, 5, 3), np.uint8), np.zeros((3, 4, 5), np.uint8)])
    with pytest.raises(UsageError, match="use predict"):
        color_segmenter.predict_batch("photo.jpg")


def test_the_card_says_the_networks_size(color_network, color_card, monkeypatch):
    card = color_card.model_copy(update={"sizing": Sizing(long_side=64)})
    fixed = Segmenter.from_network(color_network, card)
    seen = []
    run = fixed._backend.run
    monkeypatch.setattr(
        fixed._backend, "run", lambda images, refiner: seen.append(images.shape[1:3]) or run(images, refiner)
    )
    for shape in ((1, 5000), (300, 400), (20, 10)):
        assert fixed.predict(np.zeros(shape, np.uint8)).mask.shape == shape
    assert seen == [(16, 64), (48, 64), (64, 32)]


@pytest.mark.usefixtures("one_thread")
def test_many_threads_get_the_same_masks(tiny_model):
    model = Segmenter(tiny_model, device="cpu")
    images = [RNG.integers(0, 256, (32 + 16 * (i % 3), 48, 3), dtype=np.uint8) for i in range(8)]
    alone = [model.predict(image) for image in images]
    barrier = threading.Barrier(8)

    def work(start: int) -> list[tuple[int, np.ndarray]]:
        barrier.wait()
        order = [(start + step) % 8 for step in range(8)]
        return [(index, model.predict(images[index]).mask) for index in order]

    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(work, range(8)):
            for index, mask in part:
                np.testing.assert_array_equal(mask, alone[index].mask)


def test_network_in_training_is_evaluated_in_evaluation_mode(tiny_network, tiny_card, picture):
    expected = Segmenter.from_network(tiny_network, tiny_card).predict(picture)
    running = Segmenter.from_network(tiny_network, tiny_card)
    tiny_network.train()
    np.testing.assert_array_equal(running.predict(picture).scores, expected.scores)
    assert not tiny_network.training


def test_an_autocast_around_does_not_lower_the_precision(tiny_network, tiny_card, picture):
    model = Segmenter.from_network(tiny_network, tiny_card)
    expected = model.predict(picture).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(model.predict(picture).scores, expected)


def test_model_file_and_network_agree(tiny_model, tiny_network, tiny_card, picture):
    opened = Segmenter(str(tiny_model), device="cpu").predict(picture)
    np.testing.assert_allclose(
        opened.scores, Segmenter.from_network(tiny_network, tiny_card).predict(picture).scores, atol=1e-6
    )


def test_exported_model_agrees_with_torch(tiny_onnx, tiny_model):
    pytest.importorskip("onnxruntime")
    exported, original = Segmenter(tiny_onnx, device="cpu"), Segmenter(tiny_model, device="cpu")
    assert exported.card.classes == original.card.classes
    for shape in ((64, 64, 3), (37, 90, 3), (1, 1, 3), (1, 300, 3)):
        image = RNG.integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_allclose(exported.predict(image).scores, original.predict(image).scores, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(poison, color_card, picture):
    class Broken(torch.nn.Module):
        def forward(self, image):
            return image * poison

    with pytest.raises(ArtifactError, match="not finite"):
        Segmenter.from_network(Broken(), color_card).predict(picture)


def test_scores_of_another_shape_are_an_error(color_network, color_card, picture):
    card = color_card.model_copy(update={"classes": ("a", "b"), "palette": ((0, 0, 0), (1, 1, 1))})
    with pytest.raises(ArtifactError, match=r"\(1, 3, 40, 60\), its card promises \(1, 2, 40, 60\)"):
        Segmenter.from_network(color_network, card).predict(picture)


def test_a_failing_runtime_is_a_clear_error(color_card, picture):
    class Hungry(torch.nn.Module):
        def forward(self, image):
            raise RuntimeError("out of memory\nand a long trace")

    with pytest.raises(BackendError, match=r"torch failed on cpu with images of 1 x 40 x 60 \(out of memory\)"):
        Segmenter.from_network(Hungry(), color_card).predict(picture)


def test_a_batch_that_does_not_fit_is_halved(color_card, picture, caplog):
    sizes = []

    class Small(torch.nn.Module):
        def forward(self, image):
            sizes.append(len(image))
            if len(image) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return image * 8

    model = Segmenter.from_network(Small(), color_card)
    results = model.predict_batch([picture] * 7)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    for result in results:
        np.testing.assert_array_equal(result.mask, strongest(picture))
    assert "does not fit into memory" in caplog.text

    sizes.clear()
    masks = model.predict_masks([picture] * 7)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert len(masks) == 7
    np.testing.assert_array_equal(masks[-1], strongest(picture))

    class Full(torch.nn.Module):
        def forward(self, image):
            raise RuntimeError("std::bad_alloc")

    with pytest.raises(BackendError, match=r"with images of 1 x 40 x 60 \(std::bad_alloc\); use smaller batches"):
        Segmenter.from_network(Full(), color_card).predict_batch([picture] * 2)


def test_masks_alone_are_those_of_predict(any_segmenter, picture):
    images = [picture, RNG.integers(0, 256, (300, 200, 3), dtype=np.uint8), picture]
    masks = any_segmenter.predict_masks(images)
    for mask, result in zip(masks, any_segmenter.predict_batch(images), strict=True):
        np.testing.assert_array_equal(mask, result.mask)


def test_describe(any_segmenter):
    told = any_segmenter.describe()
    assert told["device"] == "cpu"
    assert told["backend"] in ("torch", "onnxruntime")
    assert {"model", "classes", "version", "device_reason", "precision", "threads"} <= told.keys()
    if told["backend"] == "onnxruntime":
        assert told["providers"] == ["CPUExecutionProvider"]
        assert told["threads"] == 1
