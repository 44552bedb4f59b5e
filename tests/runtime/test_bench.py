"""wsss-bench as it is used: figures, files, limits, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from wsss_deploy.artifact import save_model
from wsss_deploy.bench.accuracy import find_pairs, mean_iou
from wsss_deploy.bench.measure import Case, measure_apart
from wsss_deploy.bench.report import markdown, short_names, violations
from wsss_deploy.cli.bench import main
from wsss_deploy.environment import describe_environment, query_gpus
from wsss_deploy.errors import DataError
from wsss_deploy.upsampling import best_class


@pytest.fixture
def data(tmp_path, picture):
    for folder in ("images", "masks", "splits"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    truth = picture.argmax(2).astype(np.uint8)
    truth[:2] = 255
    truth[-5:] = 0  # half of the blue row is called red
    for name in "abc":
        Image.fromarray(picture).save(tmp_path / "data" / "images" / f"{name}.png")
        Image.fromarray(truth).save(tmp_path / "data" / "masks" / f"{name}.png")
    (tmp_path / "data" / "splits" / "val.txt").write_text("a\nb\nc\n")
    return tmp_path / "data"


def test_the_command(color_onnx, data, tmp_path, capsys):
    line = [str(color_onnx), "--device", "cpu", "--size", "60", "--runs", "3", "--threads", "1", "--data", str(data)]
    files = ["--json", str(tmp_path / "bench.json"), "--markdown", str(tmp_path / "bench.md")]
    with pytest.raises(SystemExit) as ended:
        main([*line, *files, "--images", "2", "--floor", "miou=0.9", "--ceiling", "p95_ms=100000"])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "miou is 0.7" in told.err
    assert "p95_ms" not in told.err
    content = json.loads((tmp_path / "bench.json").read_text())
    (row,) = content["rows"]
    assert row["p50_ms"] <= row["p95_ms"]
    assert row["first_mask_ms"] > row["open_ms"] > 0
    assert row["memory_mb"] > 10
    assert row["network_px"] == 64
    assert "| 60 (network 64) |" in told.out
    assert row["ran"]["providers"] == ["CPUExecutionProvider"]
    # By hand: red 840 of 1140, green all, blue 300 of 600 pixels.
    assert row["miou"] == pytest.approx((840 / 1140 + 1 + 300 / 600) / 3, abs=1e-6)
    assert (tmp_path / "bench.md").read_text() == told.out
    assert content["environment"]["packages"]["numpy"] in told.out
    assert str(tmp_path) not in told.out


def test_limits():
    row = {"model": "m", "device": "cpu", "size": 64, "p95_ms": 10.0, "miou": float("nan")}
    assert violations([row], {}, {"p95_ms": 10}) == []
    assert "at most 9" in violations([row], {}, {"p95_ms": 9})[0]
    assert len(violations([row], {"miou": 0.1}, {"device_memory_mb": 1})) == 2
    failed = {"model": "m", "device": "cuda", "size": 64, "error": "no CUDA"}
    assert violations([failed], {"miou": 0.1}, {}) == []
    assert "failed" in markdown([failed], describe_environment())


@pytest.mark.parametrize(
    "wrong",
    [["--floor", "fps=3"], ["--ceiling", "p95_ms=fast"], ["--runs", "0"], ["--size", "3"], ["--device", "tpu"]],
)
def test_wrong_usage(color_onnx, wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(color_onnx), *wrong])
    assert ended.value.code == 2
    assert wrong[1].partition("=")[0] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_a_row_and_a_status(color_onnx, capsys):
    if query_gpus("name"):
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        main([str(color_onnx), "--device", "cuda", "--runs", "1", "--size", "32"])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "| model.onnx | failed | cuda | 32 |" in told.out
    assert "ONNX Runtime cannot use it" in told.err
    assert "Traceback" not in told.err


def test_data(data, color_segmenter):
    assert len(find_pairs(data, "val", 2)) == 2
    with pytest.raises(DataError, match=r"has no splits/test\.txt"):
        find_pairs(data, "test")
    Image.fromarray(np.full((40, 60), 7, np.uint8)).save(data / "masks" / "b.png")
    with pytest.raises(DataError, match=r"b\.png: holds class id 7"):
        mean_iou(color_segmenter, find_pairs(data, "val"))


def test_names_of_a_split_may_hold_spaces_and_suffixes(data):
    for folder, name in (("images", "b.png"), ("masks", "b.png")):
        (data / folder / name).rename(data / folder / "my photo.v2.png")
    (data / "splits" / "val.txt").write_text("a.png\r\nmy photo.v2\n\nc\n")
    assert [image.name for image, _ in find_pairs(data, "val")] == ["a.png", "my photo.v2.png", "c.png"]
    assert all(mask.is_file() for _, mask in find_pairs(data, "val"))


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_listed_name_without_image_or_mask_is_an_error(data, folder):
    (data / folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 names have no image or no mask \(first: 'b'\)"):
        find_pairs(data, "val")
    (data / "splits" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        find_pairs(data, "val")


def test_a_network_of_one_size_tells_it(tiny_network, tiny_card, tmp_path):
    fixed = tiny_card.preprocessing.model_copy(update={"fixed_size": 64})
    save_model(tmp_path / "model.pt", tiny_card.model_copy(update={"preprocessing": fixed}), tiny_network.state_dict())
    for size in (32, 128):
        row = measure_apart(Case(model=str(tmp_path / "model.pt"), device="cpu", size=size, runs=1, threads=1))
        assert row["network_px"] == 64
        assert f"| {size} (network 64) |" in markdown([row], describe_environment())


def test_models_of_one_name_are_told_apart():
    names = ["a/model.onnx", "b/model.onnx", "b/other.pt", "x/c/last.pt", "y/c/last.pt", "a/model.onnx"]
    assert list(short_names(names).values()) == [
        "a/model.onnx",
        "b/model.onnx",
        "other.pt",
        "x/c/last.pt",
        "y/c/last.pt",
    ]
    assert short_names(["m.pt", "deep/m.pt", "./deep/m.pt"])["deep/m.pt"] == "deep/m.pt"


def test_torch_is_measured_too(tiny_model):
    row = measure_apart(Case(model=str(tiny_model), device="cpu", size=32, runs=2, threads=1, batch=2, refine=True))
    assert row["ran"]["backend"] == "torch"
    assert row["refinement"] > 0


@pytest.mark.parametrize("shape", [(3, 5, 7), (21, 300, 200), (2, 1, 1), (255, 3, 40000)])
def test_best_class_of_equal_size_is_argmax(shape):
    scores = np.random.default_rng(0).integers(0, 6, shape).astype(np.float32)  # many ties
    mask, best = best_class(scores, *shape[1:])
    np.testing.assert_array_equal(mask, scores.argmax(0))
    np.testing.assert_array_equal(best, scores.max(0))
