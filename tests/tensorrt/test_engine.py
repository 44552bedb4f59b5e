"""Building, loading and running engines against the stand-ins of conftest.py; nothing here has met a GPU."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import wsss_deploy.backends.tensorrt as runner
from export.cli import main
from export.patterns import pattern_image
from export.tensorrt_engine import build_engine, default_shapes, read_shapes
from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card
from wsss_deploy.backends.tensorrt import TensorRTBackend, load_tensorrt
from wsss_deploy.card import Sizing
from wsss_deploy.engine_manifest import manifest_path, read_manifest
from wsss_deploy.errors import ArtifactError, BackendError, ExportError, UsageError

pytestmark = pytest.mark.timeout(900)

SHAPES = read_shapes("1x1x1/1x64x96/4x128x160")


@pytest.fixture
def engine(machine, tiny_onnx, tmp_path):
    path = tmp_path / "model.engine"
    build_engine(tiny_onnx, path, SHAPES, "wsss-export model.pt --format engine")
    return path


def test_the_manifest(engine, tiny_onnx, tmp_path):
    manifest = read_manifest(engine)
    assert (manifest.tensorrt, manifest.gpu, manifest.compute_capability) == ("11.4.0", "Stand-in 9000", "9.0")
    assert manifest.shapes == SHAPES
    assert manifest.card.sizing.max_long_side == 128
    assert manifest.card.classes == read_card(tiny_onnx).classes == read_card(engine).classes
    assert (tmp_path / "cache" / "tensorrt" / "11.4.0-9.0.timing").read_bytes() == b"timings"


def test_it_gives_what_onnxruntime_gives(engine, tiny_onnx, machine):
    ours, theirs = Segmenter(engine), Segmenter(tiny_onnx, device="cpu", sizing=Sizing(max_long_side=128))
    for shape in ((1, 1), (64, 96), (128, 100), (300, 200)):  # the last is resized, as the card says
        image = pattern_image(*shape, 0)
        result, expected = ours.predict(image), theirs.predict(image)
        np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6)
        np.testing.assert_array_equal(result.mask, expected.mask)
    images = [pattern_image(64, 64, seed) for seed in range(7)]  # more than the profile's four
    for result, image in zip(ours.predict_batch(images), images, strict=True):
        np.testing.assert_array_equal(result.mask, theirs.predict(image).mask)
    told = ours.describe()
    assert (told["backend"], told["device"], told["device_name"]) == ("tensorrt", "cuda:0", "Stand-in 9000")
    assert ours.predict(images[0]).timing["refinement"] == 0
    refined = Segmenter(engine, refine=True).predict(images[0])
    assert refined.timing["refinement"] > 0


def test_it_refines_on_the_device(engine, tiny_onnx, machine, driver, monkeypatch):
    graphs = []

    def captured(handle, enqueue):
        graphs.append(handle)
        return enqueue

    monkeypatch.setattr(runner, "capture_graph", captured)
    ours = Segmenter(engine, refine=True)
    theirs = Segmenter(tiny_onnx, device="cpu", sizing=Sizing(max_long_side=128), refine=True)
    told = ours.describe()["refinement"]
    assert told["form"] == "cuda", told["form_reason"]
    layer = machine[-1]
    images = [pattern_image(64, 80, seed) for seed in range(4)]
    expected = [theirs.predict(image) for image in images]
    for _ in range(8):  # both slots, before, at and after the recording of a graph
        layer.downloaded.clear()
        for result, right in zip(ours.predict_batch(images), expected, strict=True):
            np.testing.assert_allclose(result.scores, right.scores, atol=5e-4)
            assert result.timing["refinement"] > 0
        assert layer.downloaded == [4 * 4 * 4 * 64 * 80], "one output and nothing else"
    assert len(graphs) == 2
    more = [pattern_image(64, 80, seed) for seed in range(6)]  # two beyond the profile's four
    for result, image in zip(ours.predict_batch(more), more, strict=True):
        np.testing.assert_allclose(result.scores, theirs.predict(image).scores, atol=5e-4)


def test_only_image_and_mask_cross_the_bus(engine, machine):
    segmenter = Segmenter(engine)
    layer = machine[-1]
    masks = segmenter.predict_masks([pattern_image(64, 80, seed) for seed in range(3)])
    assert layer.uploaded == [3 * 64 * 80 * 3]
    assert layer.downloaded == [3 * 64 * 80]
    assert [mask.shape for mask in masks] == [(64, 80)] * 3


def test_buffers_are_kept_while_the_shape_stays(engine, machine):
    segmenter = Segmenter(engine)
    layer = machine[-1]
    image = pattern_image(64, 80, 0)
    for _ in range(8):
        segmenter.predict(image)
    assert layer.allocated == 6  # three tensors in each of the two slots


def test_threads_get_their_own_results(engine, tiny_onnx):
    ours, theirs = Segmenter(engine), Segmenter(tiny_onnx, device="cpu", threads=1)
    images = [pattern_image(32 + 16 * (seed % 3), 64, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for image, result in zip(images, pool.map(ours.predict, images), strict=True):
            np.testing.assert_array_equal(result.mask, theirs.predict(image).mask)


def test_shapes_outside_the_profile_name_the_range(engine):
    segmenter = Segmenter(engine, sizing=Sizing(max_long_side=512))
    with pytest.raises(
        BackendError, match=r"takes 1 to 4 images of 1 to 128 pixels in height and 1 to 160 in width, found 1 x 300"
    ):
        segmenter.predict(pattern_image(300, 100, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt": "10.9.0"}, r"built by TensorRT 10\.9\.0, installed is 11\.4\.0; build it anew: wsss-export"),
        (
            {"compute_capability": "8.6", "gpu": "Old"},
            r"built on Old \(compute capability 8\.6\), here is Stand-in 9000",
        ),
        ({"engine_sha256": "0"}, "is not the engine that its manifest speaks of"),
        ({"format_version": 2}, "format_version"),
        ({"card": {}}, "card.name"),
        ({"shapes": [[1, 9, 9], [1, 5, 5], [1, 9, 9]]}, "shapes are not ordered"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_engines_of_elsewhere_are_one_sentence(engine, change, message):
    content = json.loads(manifest_path(engine).read_text())
    manifest_path(engine).write_text(json.dumps({**content, **change}))
    with pytest.raises((ArtifactError, BackendError), match=message) as error:
        Segmenter(engine)
    assert "\n" not in str(error.value)


def test_damaged_and_missing_files(engine):
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="cut short"):
        Segmenter(engine)
    manifest_path(engine).unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.engine\.json"):
        Segmenter(engine)
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        TensorRTBackend(engine, "cpu")


def test_a_build_that_fails_leaves_nothing(machine, tiny_onnx, tmp_path, monkeypatch):
    from wsss_deploy.backends import tensorrt

    out = tmp_path / "out"
    out.mkdir()
    trt = sys.modules["tensorrt"]
    monkeypatch.setattr(trt.Builder, "fail", True)
    with pytest.raises(ExportError, match="cannot build the engine: no room; try smaller --shapes"):
        build_engine(tiny_onnx, out / "model.engine", SHAPES, "again")
    monkeypatch.setattr(trt.Builder, "fail", False)
    monkeypatch.setattr(trt.OnnxParser, "parse", lambda self, content: setattr(self, "num_errors", 1))
    with pytest.raises(ExportError, match="cannot read the graph: node 3 is unknown"):
        build_engine(tiny_onnx, out / "model.engine", SHAPES, "again")
    monkeypatch.setattr(trt, "__version__", "10.8.0")
    with pytest.raises(ExportError, match=r"10\.8\.0 is too old"):
        build_engine(tiny_onnx, out / "model.engine", SHAPES, "again")
    assert list(out.iterdir()) == []
    assert tensorrt.SLOTS == 2


def test_the_command_builds_compares_and_serves(machine, tiny_model, tiny_onnx, tmp_path, monkeypatch, capsys):
    import onnx

    import export.onnx_graph

    monkeypatch.setattr(export.onnx_graph, "build_graph", lambda *_, **__: onnx.load(tiny_onnx))
    line = [str(tiny_model), "--out", str(tmp_path), "--format", "engine,triton", "--shapes", "1x1x1/1x64x96/4x512x640"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 0, capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()} - {"cache"}
    expected = {"model.onnx", "parity.json", "model.engine", "model.engine.json", "parity.engine.json", "triton"}
    assert names == expected
    report = json.loads((tmp_path / "parity.engine.json").read_text())
    assert report["verdict"] == "passed"
    assert report["providers"] == ["TensorRT 11.4.0 on Stand-in 9000"]
    assert (tmp_path / "triton" / "tiny" / "1" / "model.plan").is_file()
    assert "--shapes 1x1x1/1x64x96/4x512x640" in read_manifest(tmp_path / "model.engine").command


def test_shapes(tiny_card):
    for wrong in ("", "1x2x3", "1x64x64/1x32x32/1x64x64", "0x1x1/1x1x1/1x1x1", "1x1x1/1x1x1/1x1x99999999", "axbxc/1/2"):
        with pytest.raises(UsageError, match="--shapes"):
            read_shapes(wrong)
    low, best, high = default_shapes(tiny_card.model_copy(update={"sizing": Sizing(long_side=300)}))
    stride = tiny_card.preprocessing.stride
    assert (low, best[0], high[0]) == ((1, 1, 1), 1, 8)
    assert best[1] >= 300
    assert best[1] % stride == 0


def test_without_driver_or_library(monkeypatch):
    from wsss_deploy.backends import tensorrt

    def absent(name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match="needs an NVIDIA driver"):
        load_tensorrt()
    monkeypatch.setattr(tensorrt.ctypes, "CDLL", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'wsss-deploy\[tensorrt\]'"):
        load_tensorrt()
