"""fp16 and int8: what is half or int8 and what is not, the same contract, and the gate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from PIL import Image

import export.onnx_graph
from export.cli import main
from export.formats import FORMATS, check, read_formats, table
from export.half import to_half
from export.parity import PATTERN, SMALLEST_CLASS, THRESHOLDS, Case, _batches, _case_problems, check_parity
from export.patterns import pattern_image
from export.quantise import LADDER, _left_out, _Reader, quantise, split_images
from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card
from wsss_deploy.card import Sizing
from wsss_deploy.errors import ExportError, ImageError, UsageError

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py


@pytest.fixture(scope="module")
def single(exported):
    return onnx.load(exported() / "model.onnx")


@pytest.fixture
def traced(monkeypatch, single, exported):
    """Exports of the same model without tracing it again."""
    monkeypatch.setattr(export.onnx_graph, "build_graph", lambda *_, **__: single)
    return exported() / "model.pt"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(3):
        Image.fromarray(pattern_image(70, 90, seed)).save(folder / f"{seed}.png")
    return folder


def input_types(proto):
    typed = onnx.shape_inference.infer_shapes(proto).graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*typed.value_info, *typed.input, *typed.output)}
    types |= {item.name: item.data_type for item in proto.graph.initializer}
    return {node.name: (node.op_type, [types.get(name) for name in node.input if name]) for node in proto.graph.node}


def test_half_is_what_bears_it(single):
    half = to_half(single)
    onnx.checker.check_model(half, full_check=True)
    weights = {item.name for item in half.graph.initializer}
    types = input_types(half)
    for node in half.graph.node:
        kind, inputs = types[node.name]
        if kind in ("Softmax", "LayerNormalization", "Resize", "ReduceMean"):
            assert TensorProto.FLOAT16 not in inputs, kind
        if kind in ("Conv", "Gemm"):
            assert TensorProto.FLOAT not in inputs
        if kind == "MatMul":
            attention = not weights & set(node.input)
            assert set(inputs) == {TensorProto.FLOAT if attention else TensorProto.FLOAT16}
    size = half.ByteSize() / single.ByteSize()
    assert size < 0.75
    assert [port.type for port in half.graph.output] == [port.type for port in single.graph.output]


def test_a_weight_beyond_half_keeps_its_layer_in_float(single):
    large = onnx.ModelProto()
    large.CopyFrom(single)
    (weight,) = (item for item in large.graph.initializer if item.name.endswith("patch_embed.proj.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    half = to_half(large)
    (first,) = (node for node in half.graph.node if weight.name in node.input)
    assert first.op_type == "Conv"
    onnx.checker.check_model(half, full_check=True)


def test_fp16_is_exported_beside_fp32(traced, exported, photos, tmp_path, capsys):
    line = [str(traced), "--out", str(tmp_path), "--precision", "fp16", "--images", str(photos)]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.fp16.onnx", "parity.fp16.json"]
    report = json.loads((tmp_path / "parity.fp16.json").read_text())
    assert report["precision"] == "fp16"
    assert 1e-7 < report["score_max"] < 0.1
    segmenter = Segmenter(tmp_path / "model.fp16.onnx", device="cpu")
    assert segmenter.describe()["precision"] == "fp16"
    image = pattern_image(50, 70, 9)
    single = Segmenter(exported() / "model.onnx", device="cpu").predict(image)
    assert (segmenter.predict(image).mask == single.mask).mean() > 0.98
    assert "model.fp16.onnx" in capsys.readouterr().out


def test_int8_has_the_contract_and_the_layers(single, exported, photos):
    card = read_card(exported() / "model.onnx")
    images = sorted(photos.iterdir())
    int8 = quantise(single, card, images, 0)
    onnx.checker.check_model(int8)
    kinds = [node.op_type for node in int8.graph.node]
    assert kinds.count("QuantizeLinear") > 3
    assert int8.ByteSize() < 0.6 * single.ByteSize()
    left = [len(_left_out(single, rung)) for rung in range(len(LADDER))]
    assert left == sorted(set(left)), "every rung leaves more in float"
    session = onnxruntime.InferenceSession(int8.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = onnxruntime.InferenceSession(single.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = pattern_image(64, 96, 0)[None]
    scores, expected = (item.run(["scores"], {"image": batch})[0] for item in (session, whole))
    assert 1e-6 < np.abs(scores - expected).mean() < 0.05


def test_int8_that_fails_the_gate_climbs_the_ladder_and_leaves_nothing(traced, photos, tmp_path, monkeypatch, caplog):
    from export.parity import Thresholds

    monkeypatch.setitem(THRESHOLDS, "int8", Thresholds(score_mean=1e-9))
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as ended:
        main([str(traced), "--out", str(tmp_path), "--precision", "int8", "--images", str(photos)])
    assert ended.value.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["parity_failed.json"]
    assert sum("Calibrating" in item.message for item in caplog.records) == len(LADDER)


def test_int8_and_parity_see_windows_where_the_runtime_cuts(single, exported, photos):
    card = read_card(exported() / "model.onnx").model_copy(update={"sizing": Sizing(long_side=96, tile=64, overlap=16)})
    images = sorted(photos.iterdir())  # of 70 x 90 pixels
    assert [item["image"].shape for item in _Reader(card, images)] == [(1, 64, 64, 3)] * 4 * len(images)
    real = [(image.name, np.asarray(Image.open(image))) for image in images]
    shapes = [batch.shape for name, batch in _batches(card, real) if name != PATTERN]
    assert shapes == [(1, 64, 64, 3)] * 4 * len(images)


def test_int8_needs_images(single, exported):
    with pytest.raises(ExportError, match="--images"):
        quantise(single, read_card(exported() / "model.onnx"), [], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp61"], "did you mean fp16?"),
        (["--precision", "int8"], "add --images"),
        (["--format", "onx"], "did you mean onnx?"),
        (["--format", "engine", "--precision", "int8", "--images", "x"], "nearest is --precision fp16"),
        (["--refine", "in_graph"], "did you mean in-graph?"),
        (["--format", ","], "expected one or more of onnx"),
    ],
)
def test_mistakes_are_answered_with_the_nearest_choice(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["model.pt", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_is_in_the_help_and_in_the_document(capsys, request):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert table() in capsys.readouterr().out
    assert table() in (request.config.rootpath / "docs" / "export.md").read_text()


def test_every_row_of_the_table_passes_the_check():
    for item in FORMATS:
        for precision in item.precisions:
            for refine in item.refinements:
                check(read_formats(item.name), precision, refine, has_images=True)
    assert [item.name for item in read_formats("triton, onnx,onnx")] == ["triton", "onnx"]
    with pytest.raises(UsageError):
        read_formats("")


@pytest.mark.parametrize("lost", [0, 1, 2, 3, 4])
def test_a_class_that_vanishes_fails_whatever_else_agrees(single, exported, photos, tmp_path, lost):
    images = sorted(photos.iterdir())
    whole = check_parity(exported() / "model.pt", exported() / "model.onnx", images)
    classes = json.loads(whole.to_json())["classes"]
    assert whole.passed
    assert sum(item["share"] for item in classes.values()) == pytest.approx(1, abs=1e-5)
    name = whole.card.classes[lost]
    if classes.get(name, {"share": 0})["share"] < SMALLEST_CLASS:
        pytest.skip("this class is nowhere")
    erased = onnx.ModelProto()
    erased.CopyFrom(single)
    for node in erased.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"scores": "full", "mask": "old"}.get(item, item) for item in names]
    factors = np.ones((1, 5, 1, 1), np.float32)
    factors[0, lost] = 0
    erased.graph.initializer.append(onnx.numpy_helper.from_array(factors, "factors"))
    erased.graph.node.extend(
        [
            onnx.helper.make_node("Mul", ["full", "factors"], ["scores"]),
            onnx.helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
            onnx.helper.make_node("Cast", ["best"], ["mask"], to=TensorProto.UINT8),
        ]
    )
    onnx.save(erased, tmp_path / "model.onnx")
    lenient = dataclasses.replace(THRESHOLDS["int8"], score_mean=1.0, tie=2.0, final_agreement=0.0)
    report = check_parity(exported() / "model.pt", tmp_path / "model.onnx", images, lenient)
    assert not report.passed
    assert any(f"class '{name}': IoU 0.000 with torch's masks, not 0.5" in item for item in report.problems)


def test_pixels_that_may_differ_where_nothing_is_tied():
    few, many = (Case("x", (1, 10, 100), 0.9, 0.01, 0.98, 0, wrong) for wrong in (10, 11))
    assert not list(_case_problems(few, THRESHOLDS["int8"]))
    (problem,) = _case_problems(many, THRESHOLDS["int8"])
    assert "11 pixels have another class, where torch's best two are 0.5 apart" in problem
    assert list(_case_problems(few, THRESHOLDS["bf16"]))


@pytest.mark.parametrize(("count", "calibrated", "judged"), [(3, 3, 3), (7, 7, 7), (8, 6, 2), (100, 32, 8)])
def test_images_are_kept_apart_where_there_are_enough(count, calibrated, judged):
    images = [Path(f"{index}.png") for index in range(count)]
    ranges, held = split_images(images)
    assert (len(ranges), len(held)) == (calibrated, judged)
    assert count < 8 or not set(ranges) & set(held)


def test_a_broken_image_is_named(single, exported, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        quantise(single, read_card(exported() / "model.onnx"), [*photos.iterdir(), tmp_path / "broken.jpg"], 0)
