"""The exported file is what the contract says, and it computes what torch computes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.half import to_half
from export.onnx_graph import state_digest
from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model, read_card
from wsss_deploy.networks import DeployedNetwork, restore_network

# Tracing takes ten seconds of a quiet core, and the first test that needs a file waits for it.
pytestmark = pytest.mark.timeout(900)

SIZES = [(1, 1, 1), (3, 32, 64), (2, 37, 91), (1, 7, 200), (1, 130, 5), (1, 160, 160)]


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "opset"), [("test_vit", 20), ("convnext_atto", 18), ("pvt_v2_b0", 23)])
def test_any_batch_and_size_agrees_with_torch(exported, encoder, opset):
    folder = exported(encoder, opset)
    card, state_dict = load_model(folder / "model.pt")
    reference = DeployedNetwork(restore_network(card, state_dict, "model.pt"), card.preprocessing)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for shape in SIZES:
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        scores, mask = session.run(["scores", "mask"], {"image": image})
        with torch.no_grad():
            expected, expected_mask = reference(torch.from_numpy(image))
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)
        assert (mask == expected_mask.numpy()).mean() > 0.999
        assert np.array_equal(mask, scores.argmax(axis=1))
    assert onnx.load(folder / "model.onnx").opset_import[0].version == opset


def test_inputs_and_outputs(exported):
    session = onnxruntime.InferenceSession(exported() / "model.onnx", providers=["CPUExecutionProvider"])
    described = {port.name: (port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())}
    assert described == {
        "image": ("tensor(uint8)", ["batch", "height", "width", 3]),
        "scores": ("tensor(float)", ["batch", 5, "height", "width"]),
        "mask": ("tensor(uint8)", ["batch", "height", "width"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "opset"), [("test_vit", 20), ("convnext_atto", 18), ("pvt_v2_b0", 23)])
def test_bytes_are_at_the_edges_alone(exported, bytes_within, encoder, opset):
    # TensorRT has no other layer for them.
    proto = onnx.load(exported(encoder, opset) / "model.onnx")
    assert bytes_within(proto) == []
    assert bytes_within(to_half(proto)) == []


def test_the_card_travels_with_the_file(exported):
    folder = exported()
    original, state_dict = load_model(folder / "model.pt")
    card = read_card(folder / "model.onnx")
    assert card.model_copy(update={"digests": {}, "versions": {}}) == original
    assert card.digests["state_dict"] == state_digest(state_dict)
    assert card.versions["onnx_opset"] == "20"
    assert card.versions["onnx_ir"] == str(onnx.load(folder / "model.onnx").ir_version)
    changed = {**state_dict, "decoder.narrow.bias": state_dict["decoder.narrow.bias"] + 1e-6}
    assert state_digest(changed) != state_digest(state_dict)


def test_one_file_without_traces_of_the_machine(exported):
    folder = exported()
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.pt", "parity.json"]
    content = (folder / "model.onnx").read_bytes()
    for trace in (b".py", b"site-packages", b"File \\", b"torch.nn", str(folder).encode(), b"/home"):
        assert trace not in content
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert [entry.key for entry in proto.metadata_props] == ["wsss_card"]


def test_the_report(exported):
    folder = exported()
    report = json.loads((folder / "parity.json").read_text())
    assert report["verdict"] == "passed"
    assert report["problems"] == []
    assert report["model_sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert report["providers"] == ["CPUExecutionProvider"]
    assert report["score_max"] < 1e-4
    assert report["versions"]["onnx_opset"] == "20"
    shapes = [tuple(case["shape"]) for case in report["cases"]]
    assert (1, 1, 1) in shapes
    assert any(count > 1 for count, _, _ in shapes)
    assert any(height % 16 and height != width for _, height, width in shapes)
    assert len(report["final"]) >= 2


def test_the_runtime_gives_one_result_from_both_files(exported, shared):
    folder = exported()
    image = next((shared / "data" / "camvid" / "images").glob("**/*.*"))
    ours, theirs = (Segmenter(folder / name, device="cpu").predict(image) for name in ("model.pt", "model.onnx"))
    assert (ours.mask == theirs.mask).mean() > 0.999
    np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-4)


def test_the_command_is_quiet_and_sums_up(command):
    folder, done = command
    assert done.stderr.splitlines() == ["Exporting model.pt (test_vit) at opset 20", "Checking it against torch"]
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["file"] == str(folder / "model.onnx")
    assert "100.0000%" in done.stdout
    assert f"wsss-predict IMAGE --model {folder / 'model.onnx'}" in lines["next"]
