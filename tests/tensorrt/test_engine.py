"""Building, loading and running engines against the stand-ins of conftest.py; nothing here has met a GPU."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import wsss_deploy.backends.tensorrt as runner
from export.arguments import engine_command
from export.cli import main
from export.onnx_functions import AFFINITY, STEP
from export.patterns import pattern_image
from export.tensorrt_engine import _within, build_engine, check_shapes, default_shapes, read_shapes
from export.triton import write_repository
from wsss_deploy import Segmenter, engine_manifest
from wsss_deploy.artifact import read_card
from wsss_deploy.backends.tensorrt import TensorRTBackend, load_tensorrt
from wsss_deploy.card import Sizing
from wsss_deploy.cli.file_checks import check_file
from wsss_deploy.engine_manifest import manifest_path, plugin_digests, read_engine, read_manifest
from wsss_deploy.errors import ArtifactError, BackendError, ExportError, UsageError
from wsss_deploy.pairwise.cuda_source import source
from wsss_deploy.refinement import DEFAULT, Refiner
from wsss_deploy.sizing import network_size

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
    assert (tmp_path / "cache" / "tensorrt" / "11.4.0-9.0-Stand-in_9000.timing").read_bytes() == b"timings"


@pytest.mark.parametrize(
    "case", ["damaged", "rejected", "refused with an error", "no cache at all", "cannot be read out"]
)
def test_a_timing_cache_never_fails_an_export(machine, tiny_onnx, tmp_path, monkeypatch, case):
    file = tmp_path / "cache" / "tensorrt" / "11.4.0-9.0-Stand-in_9000.timing"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another driver")
    attached = []
    builder = sys.modules["tensorrt"].Builder

    class Timings(type(builder(None).create_builder_config())):
        def create_timing_cache(self, content):
            if case == "no cache at all" or (case == "damaged" and content):
                return None
            self.given = content
            return super().create_timing_cache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            if cache is None or (case == "refused with an error" and self.given):
                raise TypeError("incompatible function arguments")
            if case == "rejected" and self.given:
                return False
            attached.append(self.given)
            return super().set_timing_cache(cache, ignore_mismatch)

        def get_timing_cache(self):
            return getattr(self, "cache", None) if case != "cannot be read out" else None

    monkeypatch.setattr(builder, "create_builder_config", lambda self: Timings())
    engine = tmp_path / "model.engine"
    build_engine(tiny_onnx, engine, SHAPES, "wsss-export")
    assert read_engine(engine, read_manifest(engine))
    kept = {"damaged": b"timings", "rejected": b"timings", "refused with an error": b"timings"}
    assert file.read_bytes() == kept.get(case, b"of another driver")
    assert attached == {"no cache at all": [], "cannot be read out": [b"of another driver"]}.get(case, [b""])


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


def test_masks_of_other_sizes_cross_alone(engine, tiny_onnx, machine, driver):
    sizing = Sizing(long_side=64)
    for refine in (False, DEFAULT):
        ours = Segmenter(engine, refine=refine, sizing=sizing)
        theirs = Segmenter(tiny_onnx, device="cpu", refine=refine, sizing=sizing)
        assert ours.describe()["masks"] == "on the device"
        layer = machine[-1]
        images = [pattern_image(72 + 3 * seed, 96 + 4 * seed, seed) for seed in range(10)]  # more than two batches
        for _ in range(2):
            layer.downloaded.clear(), layer.uploaded.clear()
            masks = ours.predict_masks(images)
            assert layer.uploaded == [4 * 48 * 64 * 3, 4 * 48 * 64 * 3, 2 * 48 * 64 * 3]
            assert sum(layer.downloaded) == sum(mask.size for mask in masks)
            for mask, image in zip(masks, images, strict=True):
                assert mask.shape == image.shape[:2]
                assert (mask == theirs.predict(image).mask).mean() > 0.998


def test_buffers_are_kept_while_the_shape_stays(engine, machine):
    segmenter = Segmenter(engine)
    layer = machine[-1]
    image = pattern_image(64, 80, 0)
    for _ in range(8):
        segmenter.predict(image)
    assert layer.allocated == 6  # three tensors in each of the two slots


def test_batches_of_one_call_overlap(engine, tiny_onnx, lazy_machine):
    ours, theirs = Segmenter(engine), Segmenter(tiny_onnx, device="cpu", threads=1)
    layer = lazy_machine[-1]
    images = [pattern_image(48, 64, seed) for seed in range(18)]  # five batches, the last of another shape
    for _ in range(2):
        layer.events.clear()
        masks = ours.predict_masks(images)
        for mask, image in zip(masks, images, strict=True):
            np.testing.assert_array_equal(mask, theirs.predict(image).mask)
        told = [event for event in layer.events if isinstance(event, tuple)]
        first, second = dict.fromkeys(handle for _, handle in told)
        done = [("upload", first), ("network", first), ("download", first)]
        assert told[:3] == done
        assert [(name, first) for name, handle in told[3:6] if handle == second] == done, "before any wait"
        assert told[6] == ("wait", first)
        assert told[7] == ("upload", first), "the next batch starts while the second one runs"
        assert not layer.work, "nothing is left in a stream"


@pytest.mark.parametrize("method", ["predict_masks", "predict_batch"])
def test_batches_overlap_with_default_shapes(tiny_onnx, tmp_path, lazy_machine, method):
    path = tmp_path / "model.engine"
    build_engine(tiny_onnx, path, None, "wsss-export")
    segmenter = Segmenter(path)
    layer = lazy_machine[-1]
    images = [pattern_image(512, 512, seed) for seed in range(32)]
    assert len(getattr(segmenter, method)(images)) == 32
    told = [event for event in layer.events if isinstance(event, tuple)]
    first, second = dict.fromkeys(handle for _, handle in told)
    before = told[: told.index(("wait", first))]
    assert ("network", second) in before, "the second batch is there before the first one is waited for"
    assert sum(name == "network" for name, _ in told) == 4, "of eight images each"
    uploads = [index for index, event in enumerate(told) if event[0] == "upload"]
    assert uploads[2] < told.index(("wait", second)), "and the third one while the second one runs"


@pytest.mark.parametrize(("side", "images"), [(16, 16), (512, 16), (1448, 16), (1500, 12), (4000, 2), (9000, 1)])
def test_images_of_one_call(engine, side, images):
    for masks in (False, True):
        assert TensorRTBackend(engine, "cuda").batch_budget(side, side, masks) == images


def with_card(backend, classes, shapes):
    """The backend as if its engine were of other classes and shapes."""
    manifest = backend._manifest
    card = manifest.card.model_copy(update={"classes": tuple(map(str, range(classes)))})
    backend._manifest = manifest.model_copy(update={"card": card, "shapes": read_shapes(shapes)})
    return backend


@pytest.mark.parametrize(
    ("classes", "shapes", "side", "batch", "scores", "masks"),
    [
        (4, "1x1x1/1x512x512/8x1024x1024", 512, 8, 32, 32),
        (4, "1x1x1/1x512x512/8x1024x1024", 1024, 8, 32, 32),
        (21, "1x1x1/1x512x512/8x1024x1024", 512, 7, 21, 28),
        (150, "1x1x1/1x512x512/8x1024x1024", 512, 7, 7, 28),
        (150, "1x1x1/1x512x512/8x1024x1024", 1024, 1, 1, 4),
        (150, "1x1x1/8x1024x1024/8x1024x1024", 1024, 8, 8, 32),  # so many were asked for
        (150, "2x1x1/2x512x512/8x1024x1024", 1024, 8, 8, 32),
    ],
)
def test_scores_of_one_call_are_bounded_in_bytes(engine, classes, shapes, side, batch, scores, masks):
    backend = with_card(TensorRTBackend(engine, "cuda"), classes, shapes)
    assert backend._batch(side, side) == batch, "of one slot"
    assert [backend.batch_budget(side, side, masks) for masks in (False, True)] == [scores, masks]
    assert scores == batch or 4 * classes * side * side * scores <= 2**29


def test_a_slot_holds_one_batch_of_large_images(engine, tiny_onnx, machine, monkeypatch):
    monkeypatch.setattr(runner, "BATCH_PIXELS", 2 * 64 * 80)
    monkeypatch.setattr(runner, "_BYTES", 1)
    backend = with_card(TensorRTBackend(engine, "cuda"), 4, "1x1x1/1x64x80/4x128x160")
    images = np.stack([pattern_image(64, 80, seed) for seed in range(7)])
    scores = backend.run(images).scores
    assert machine[-1].uploaded == [2 * 64 * 80 * 3] * 3 + [64 * 80 * 3]
    theirs = Segmenter(tiny_onnx, device="cpu", threads=1)
    for found, image in zip(scores, images, strict=True):
        np.testing.assert_allclose(found, theirs.predict(image).scores, atol=1e-6)


class ShortNumpy:
    """numpy that has no memory for arrays of more than four images."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype):
        if shape[0] > 4:
            raise MemoryError(f"Unable to allocate an array with shape {shape}")
        return np.empty(shape, dtype)


@pytest.mark.parametrize("method", ["predict_masks", "predict_batch"])
def test_joined_outputs_that_do_not_fit_are_halved(engine, machine, monkeypatch, caplog, method):
    segmenter = Segmenter(engine)
    images = [pattern_image(64, 80, seed) for seed in range(14)]
    expected = [segmenter.predict(image).mask for image in images]
    monkeypatch.setattr(runner, "np", ShortNumpy())
    for found, right in zip(getattr(segmenter, method)(images), expected, strict=True):
        np.testing.assert_array_equal(found if method == "predict_masks" else found.mask, right)
    assert "A batch of 14 images does not fit into memory" in caplog.text


@pytest.mark.parametrize("count", [3, 11])
def test_refinement_on_the_host_is_of_each_batch(engine, tiny_onnx, machine, monkeypatch, caplog, count):
    monkeypatch.setattr(runner._Slot, "obstacle", lambda *_: "an obstacle")
    images = [pattern_image(64, 80, seed) for seed in range(count)]
    ours, theirs = Segmenter(engine, refine=DEFAULT), Segmenter(tiny_onnx, device="cpu", refine=DEFAULT)
    for found, image in zip(ours.predict_batch(images), images, strict=True):
        np.testing.assert_allclose(found.scores, theirs.predict(image).scores, atol=1e-5)
        assert found.timing["refinement"] > 0
    refine = Refiner.__call__

    def short(self, scores, images):
        if count > 4 and len(seen) < 2:
            seen.append(len(images))
            raise MemoryError("Unable to allocate")
        return refine(self, scores, images)

    seen = []
    monkeypatch.setattr(Refiner, "__call__", short)
    assert len(ours.predict_batch(images)) == count
    assert ("does not fit into memory" in caplog.text) == (count > 4)


def test_a_failure_leaves_nothing_in_the_other_slot(engine, tiny_onnx, lazy_machine, monkeypatch):
    ours, theirs = TensorRTBackend(engine, "cuda"), Segmenter(tiny_onnx, device="cpu", threads=1)
    layer, wait = lazy_machine[-1], lazy_machine[-1].wait
    images = np.stack([pattern_image(48, 64, seed) for seed in range(12)])

    def failing(stream):
        monkeypatch.setattr(layer, "wait", wait)
        raise BackendError("CUDA failed (cudaErrorLaunchFailure)")

    monkeypatch.setattr(layer, "wait", failing)
    with pytest.raises(BackendError, match="cudaErrorLaunchFailure"):
        ours.masks(images)
    assert not layer.work
    for mask, image in zip(ours.masks(images), images, strict=True):
        np.testing.assert_array_equal(mask, theirs.predict(image).mask)


def test_a_call_with_one_slot_left_does_not_wait_for_another(engine, lazy_machine):
    backend = TensorRTBackend(engine, "cuda")
    images = np.stack([pattern_image(48, 64, seed) for seed in range(12)])
    expected = backend.masks(images)
    backend._free.get()
    np.testing.assert_array_equal(backend.masks(images), expected)


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
    manifest = read_manifest(tmp_path / "model.engine")
    words = shlex.split(manifest.command)
    assert words[:4] == ["wsss-export", str(tiny_model), "--format", "engine"]
    told = dict(zip(words[2::2], words[3::2], strict=True))
    assert told.pop("--out") == str(tmp_path)
    assert told == {
        "--format": "engine",
        "--precision": "fp32",
        "--opset": "20",
        "--refine": "none",
        "--shapes": "1x1x1/1x64x96/4x512x640",
    }
    assert "max_batch_size: 4" in (tmp_path / "triton" / "tiny" / "config.pbtxt").read_text()


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


def test_the_command_of_a_manifest_has_every_argument_and_no_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = argparse.Namespace(
        model=Path("my runs/model.pt"),
        precision="fp16",
        refine="in-graph",
        opset=18,
        size=128,
        out=Path("deploy"),
        images="photos/*.jpg",
        data=Path("scenes"),
        split="test",
        shapes="1x1x1/1x128x128/8x128x128",
    )
    words = shlex.split(engine_command(given))
    assert words[:2] == ["wsss-export", str(tmp_path / "my runs" / "model.pt")]
    told = dict(zip(words[2::2], words[3::2], strict=True))
    assert {name.removeprefix("--"): value for name, value in told.items()} == {
        "format": "engine",
        "precision": "fp16",
        "refine": "in-graph",
        "opset": "18",
        "size": "128",
        "out": str(tmp_path / "deploy"),
        "images": str(tmp_path / "photos" / "*.jpg"),
        "data": str(tmp_path / "scenes"),
        "split": "test",
        "shapes": "1x1x1/1x128x128/8x128x128",
    }


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("1x480x480/1x480x480/4x512x512", "480 x 640 becomes 320 x 416"),
        ("2x1x1/2x416x416/4x416x416", "one ordinary image at a time lies outside"),
        ("1x1x1/1x8x8/1x8x8", "at least 32 pixels a side of MAX"),
        ("1x1x1/1x8x512/1x8x512", "at least 32 pixels a side of MAX"),
    ],
)
def test_shapes_that_the_plan_does_not_meet(tiny_card, shapes, message):
    card = planned(tiny_card, Sizing(long_side=416))
    with pytest.raises(UsageError, match=message):
        check_shapes(read_shapes(shapes), card)


def planned(card, sizing, **preprocessing):
    changed = card.preprocessing.model_copy(update={"stride": 32, **preprocessing})
    return card.model_copy(update={"preprocessing": changed, "sizing": sizing})


def test_shapes_and_a_fixed_size(tiny_card):
    card = planned(tiny_card, Sizing(), fixed_size=128)
    check_shapes(default_shapes(card), card)
    with pytest.raises(UsageError, match="takes images up to 128 pixels a side"):
        check_shapes(read_shapes("1x64x64/1x512x512/8x1024x1024"), card)


@pytest.mark.parametrize("most", [100, 120, 150, 416, 1000])
@pytest.mark.parametrize("sizing", [Sizing(), Sizing(long_side=416), Sizing(long_side=416, tile=512, overlap=128)])
def test_no_planned_size_lies_beyond_the_largest_shape(tiny_card, most, sizing, caplog):
    card, shapes = planned(tiny_card, sizing), read_shapes(f"1x1x1/1x64x64/2x{most}x{most}")
    check_shapes(shapes, card)
    assert not caplog.records
    limited = _within(card, shapes)
    for size in ((480, 640), (3000, 100), (1, 9), (101, 121), (5000, 5000)):
        assert max(network_size(*size, limited)) <= most


def test_some_ordinary_images_outside_are_a_warning(tiny_card, caplog):
    with caplog.at_level("WARNING"):
        check_shapes(read_shapes("1x256x256/1x512x512/4x1024x1024"), planned(tiny_card, Sizing()))
    assert "240 x 320 becomes 240 x 320" in caplog.text
    assert "480 x 640" not in caplog.text


def test_plugins_are_held_against_this_release(engine, machine, monkeypatch):
    content = json.loads(manifest_path(engine).read_text())
    refinement = DEFAULT.model_copy(update={"in_graph": True})
    content["card"]["refinement"] = json.loads(refinement.model_dump_json())
    content["plugins"] = plugin_digests(refinement)
    assert sorted(content["plugins"]) == sorted((AFFINITY, STEP))
    manifest_path(engine).write_text(json.dumps(content))
    read_engine(engine, read_manifest(engine))
    monkeypatch.setattr(
        engine_manifest, "source", lambda parameters: f"// other words\n{source(parameters)}  /* and\nlines */"
    )
    read_engine(engine, read_manifest(engine))
    monkeypatch.setattr(engine_manifest, "source", lambda parameters: source(parameters) + "int other;")
    with pytest.raises(ArtifactError, match=r"refines by other kernels .*PairwiseAffinity.*build it anew: wsss-export"):
        Segmenter(engine)
    monkeypatch.undo()
    manifest_path(engine).write_text(json.dumps({**content, "plugins": {}}))
    with pytest.raises(ArtifactError, match=r"plugins: none"):
        read_engine(engine, read_manifest(engine))


def test_another_gpu_of_the_same_kind_is_a_warning(engine, caplog):
    with caplog.at_level("WARNING"):
        read_manifest(engine).check_machine(engine, "11.4.0", "Other 9000", "9.0")
    assert "was built on Stand-in 9000, here is Other 9000" in caplog.text


def test_the_graph_beside_an_engine(engine, tiny_onnx):
    def told():
        return [(item.passed, item.detail) for item in check_file(str(engine)) if item.name == "graph"]

    assert told() == []
    graph = engine.with_suffix(".onnx")
    graph.write_bytes(tiny_onnx.read_bytes())
    assert told() == [(True, "was built from the model.onnx beside it")]
    graph.write_bytes(tiny_onnx.read_bytes() + b"\0")
    assert told()[0][0] is False


@pytest.mark.parametrize(
    ("shapes", "asked", "most", "warm"),
    [
        ("1x64x64/1x416x416/4x416x416", None, 4, [320, 416, 3]),
        ("1x64x64/1x416x416/32x416x416", None, 8, [320, 416, 3]),
        ("1x64x64/1x416x416/32x416x416", 32, 32, [320, 416, 3]),
        ("1x384x64/1x416x416/4x416x416", None, 4, [384, 416, 3]),
        ("1x64x64/1x128x256/4x128x256", None, 4, [128, 256, 3]),
        ("1x64x64/1x416x416/4x416x416", 5, None, "max_batch is 5, the engine takes 4 images"),
        ("2x64x64/2x416x416/4x416x416", None, None, "the engine takes 2 images at least"),
    ],
)
def test_a_repository_keeps_within_the_profile(engine, tmp_path, tiny_card, shapes, asked, most, warm):
    content = json.loads(manifest_path(engine).read_text())
    card = json.loads(planned(tiny_card, Sizing(long_side=416)).to_json())
    manifest_path(engine).write_text(json.dumps({**content, "shapes": read_shapes(shapes), "card": card}))
    if most is None:
        with pytest.raises(UsageError, match=warm):
            write_repository(engine, tmp_path / "models", "roads", max_batch=asked)
        return
    text = (write_repository(engine, tmp_path / "models", "roads", max_batch=asked) / "config.pbtxt").read_text()
    assert f"max_batch_size: {most}\n" in text
    assert f"dims: {warm} zero_data" in text.replace("[ ", "[").replace(" ]", "]")
