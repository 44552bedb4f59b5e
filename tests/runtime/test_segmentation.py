from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from wsss_deploy import upsampling
from wsss_deploy.card import default_palette
from wsss_deploy.errors import BackendError, ImageError, WsssError
from wsss_deploy.segmentation import Segmentation
from wsss_deploy.upsampling import best_class, upsample

RNG = np.random.default_rng(0)
CLASSES = ("background", "cat", "dog", "tree")


def random_scores(classes: int, height: int, width: int) -> np.ndarray:
    logits = RNG.normal(size=(classes, height, width)) * 3
    scores = np.exp(logits)
    return (scores / scores.sum(0)).astype(np.float32)


def of_mask(mask: np.ndarray, scale: int = 1) -> Segmentation:
    """A result whose mask is known."""
    scores = np.eye(len(CLASSES), dtype=np.float32)[mask].transpose(2, 0, 1)
    image = np.full((*(np.array(mask.shape) * scale), 3), 200, np.uint8)
    timing = {"pre": 1.0, "inference": 2.0, "refinement": 0.0, "post": 3.0}
    return Segmentation(np.ascontiguousarray(scores), image, CLASSES, default_palette(len(CLASSES)), timing)


@pytest.fixture
def result() -> Segmentation:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 3:9] = 1
    mask[0:2, 20:30] = 3
    mask[18:20, 0:1] = 3
    return of_mask(mask)


def linear_weights(small: int, large: int) -> np.ndarray:
    """Half-pixel linear interpolation (with averaging when reducing) as a matrix, (large, small)."""
    ratio = small / large
    centres = (np.arange(large) + 0.5) * ratio
    distance = np.abs(np.arange(small) + 0.5 - centres[:, None]) / max(ratio, 1)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


SIZES = [
    ((16, 16), (16, 16)),
    ((16, 24), (61, 100)),
    ((16, 256), (1, 5000)),
    ((256, 16), (5000, 1)),
    ((64, 64), (1, 1)),
    ((1, 1), (7, 5)),
    ((33, 17), (20, 90)),
    ((48, 64), (1, 64)),
]


@pytest.mark.parametrize("band", [300, 2_000_000])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_upsampling(small, large, band, monkeypatch):
    monkeypatch.setattr(upsampling, "BAND_PIXELS", band)
    scores = random_scores(6, *small)
    result = upsample(scores, *large)
    rows, columns = linear_weights(small[0], large[0]), linear_weights(small[1], large[1])
    np.testing.assert_allclose(result, np.einsum("Hh,chw,Ww->cHW", rows, scores, columns), atol=5e-6)
    mask, confidence = best_class(scores, *large)
    assert mask.dtype == np.uint8
    assert confidence.dtype == np.float32
    np.testing.assert_array_equal(mask, result.argmax(0))
    np.testing.assert_array_equal(confidence, result.max(0))


def test_upsampling_is_torchs_interpolation():
    torch = pytest.importorskip("torch")
    scores = random_scores(4, 24, 32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], (97, 150), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(upsample(scores, 97, 150), theirs, atol=5e-6)


def test_ties_and_hopeless_channels_match_argmax():
    scores = np.full((5, 4, 4), 0.2, np.float32)  # all equal: the lowest class wins
    assert best_class(scores, 9, 9)[0].max() == 0
    confident = np.full((50, 8, 8), 0.001, np.float32)
    confident[7] = 0.951
    confident[31, 2:5, 2:5], confident[7, 2:5, 2:5] = 0.6, 0.352
    mask, _ = best_class(confident, 30, 30)
    np.testing.assert_array_equal(mask, upsample(confident, 30, 30).argmax(0))
    assert set(np.unique(mask)) == {7, 31}


def test_mask_never_needs_all_channels_at_full_size():
    import tracemalloc

    scores = random_scores(40, 32, 32)
    tracemalloc.start()
    best_class(scores, 1500, 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 1500 * 2000 + 60_000_000  # far below 40 channels of float32, 480 MB


def test_fields_and_scores(result):
    assert result.mask.shape == result.confidence.shape == (20, 30)
    large = of_mask(result.mask, scale=3)
    assert large.scores.shape == (4, 60, 90)
    np.testing.assert_array_equal(large.mask, large.scores.argmax(0))
    np.testing.assert_array_equal(large.confidence, large.scores.max(0))
    with pytest.raises(AttributeError):
        result.mask = None


def test_legend(result):
    legend = result.legend()
    assert [(entry.id, entry.name) for entry in legend] == [(0, "background"), (1, "cat"), (3, "tree")]
    assert [round(entry.share * 600) for entry in legend] == [518, 60, 22]
    assert all(entry.confidence == 1 for entry in legend)
    assert legend[1].color == default_palette(4)[1]
    assert "cat 10.0%" in repr(result)


def test_overlay_tints_classes_and_leaves_background_clear(result):
    overlay = np.asarray(result.overlay(opacity=0.25))
    cat = np.array(default_palette(4)[1])
    np.testing.assert_array_equal(overlay[17, 15], [200] * 3)
    np.testing.assert_allclose(overlay[10, 6], 0.75 * 200 + 0.25 * cat, atol=1)
    np.testing.assert_array_equal(overlay[5, 5], cat)  # outline
    np.testing.assert_array_equal(overlay[4, 5], [200] * 3)  # and none on the background's side
    assert np.asarray(result.overlay(np.zeros((20, 30), np.uint8)))[17, 15].max() == 0


def test_overlay_refuses_other_sizes_and_opacities(result):
    with pytest.raises(ImageError, match="the image is 20 x 30, the mask 30 x 20"):
        result.overlay(np.zeros((30, 20, 3), np.uint8))
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ImageError, match="0 to 1"):
            result.overlay(opacity=opacity)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_results_can_be_drawn_and_saved(shape, tmp_path):
    result = of_mask(RNG.integers(0, 4, shape).astype(np.uint8))
    assert result.overlay().size == shape[::-1]
    assert len(result.save(tmp_path)) == 3
    assert sum(item["area"] for item in result.to_coco()) == shape[0] * shape[1]


def test_save_mask(result, tmp_path):
    path = tmp_path / "new" / "a.png"
    assert result.save(path) == (path,)
    image = Image.open(path)
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), result.mask)
    assert image.convert("RGB").getpixel((5, 10)) == default_palette(4)[1]
    assert os.listdir(path.parent) == ["a.png"]


def test_save_folder(result, tmp_path):
    files = result.save(tmp_path / "out")
    assert [file.name for file in files] == ["mask.png", "overlay.png", "segmentation.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), result.mask)
    np.testing.assert_array_equal(np.asarray(Image.open(files[1])), np.asarray(result.overlay()))
    summary = json.loads(files[2].read_text())
    assert (summary["width"], summary["height"]) == (30, 20)
    assert summary["classes"][1] == {"id": 1, "name": "cat", "color": [128, 0, 0], "share": 0.1, "confidence": 1.0}
    assert summary["timing_ms"] == {"pre": 1.0, "inference": 2.0, "refinement": 0.0, "post": 3.0}


def test_save_refuses_lossy_formats_and_bad_places(result, tmp_path):
    with pytest.raises(ImageError, match=r"found '\.jpg'"):
        result.save(tmp_path / "a.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(WsssError, match="cannot be written"):
        result.save(tmp_path / "file" / "a.png")
    assert os.listdir(tmp_path) == ["file"]


def decode_runs(segmentation: dict) -> np.ndarray:
    """COCO's uncompressed run lengths by their definition, pixel by pixel."""
    height, width = segmentation["size"]
    mask, position, inside = np.zeros((height, width), bool), 0, False
    for count in segmentation["counts"]:
        for index in range(position, position + count):
            mask[index % height, index // height] = inside
        position, inside = position + count, not inside
    assert position == height * width
    return mask


def test_coco(result):
    annotations = json.loads(json.dumps(result.to_coco(image_id=7, first_id=100)))
    assert [item["id"] for item in annotations] == [100, 101, 102]
    assert [item["category_id"] for item in annotations] == [0, 1, 3]
    assert {item["image_id"] for item in annotations} == {7}
    for item in annotations:
        mask = result.mask == item["category_id"]
        np.testing.assert_array_equal(decode_runs(item["segmentation"]), mask)
        assert item["area"] == mask.sum()
    assert annotations[1]["bbox"] == [3, 5, 6, 10]
    assert annotations[2]["bbox"] == [0, 0, 30, 20]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_coco_loads_in_pycocotools(result, tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco")
    path = tmp_path / "annotations.json"
    images = [{"id": 1, "width": 30, "height": 20, "file_name": "a.png"}]
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": result.to_coco()}))
    coco = coco_module.COCO(path)
    for item in coco.loadAnns(coco.getAnnIds(imgIds=1)):
        np.testing.assert_array_equal(coco.annToMask(item), result.mask == item["category_id"])


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision(result):
    pytest.importorskip("supervision")
    detections = result.to_supervision()
    assert detections.class_id.tolist() == [0, 1, 3]
    assert detections["class_name"].tolist() == ["background", "cat", "tree"]
    np.testing.assert_array_equal(detections.mask[1], result.mask == 1)
    assert detections.xyxy[1].tolist() == [3, 5, 8, 14]


def test_supervision_absent(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(BackendError, match=r"pip install 'wsss-deploy\[supervision\]'"):
        result.to_supervision()


def test_notebook_display(result):
    image = Image.open(io.BytesIO(result._repr_png_()))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(result.overlay()))
