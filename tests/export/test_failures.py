"""What goes wrong leaves a clear error and nothing that looks finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export.onnx_graph
from export.cli import main
from export.onnx_graph import export_onnx
from export.parity import Case, Thresholds, check_parity
from wsss_deploy.errors import ArtifactError, ExportError, ParityError

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py


def perturb(proto: onnx.ModelProto, amount: float) -> None:
    """Change the last layer's weights."""
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("classify.coarse.weight"))
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, amount, values.shape).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(values + noise * np.abs(values).mean(), weight.name))


@pytest.fixture
def broken_graph(monkeypatch, exported):
    """The exporter gives the right graph with changed weights; call it with the relative amount."""
    proto = onnx.load(exported() / "model.onnx")

    def use(amount: float) -> Path:
        perturb(proto, amount)
        monkeypatch.setattr(export.onnx_graph, "build_graph", lambda *_, **__: proto)
        return exported() / "model.pt"

    return use


@pytest.mark.parametrize("amount", [1.0, 0.02])
def test_a_mismatch_leaves_no_artifact(broken_graph, tmp_path, capsys, amount):
    model = broken_graph(amount)
    with pytest.raises(SystemExit) as exit_status:
        main([str(model), "--out", str(tmp_path / "out")])
    assert exit_status.value.code == 1
    message = capsys.readouterr().err
    assert "gives other results than torch" in message
    assert "Traceback" not in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parity_failed.json"]
    report = json.loads((tmp_path / "out" / "parity_failed.json").read_text())
    assert report["verdict"] == "failed"
    assert report["problems"]
    assert report["score_max"] > 1e-3


def test_an_older_artifact_stays_whole(broken_graph, exported, tmp_path):
    for name in ("model.onnx", "parity.json"):
        shutil.copy(exported() / name, tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParityError, match="nothing was exported"):
        export_onnx(broken_graph(1.0), tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.pop("parity_failed.json")
    assert after == before


def test_a_graph_that_does_not_run_is_a_mismatch(monkeypatch, exported, tmp_path):
    proto = onnx.load(exported() / "model.onnx")
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("classify.coarse.weight"))
    weight.CopyFrom(numpy_helper.from_array(np.zeros((5, 3, 1, 1), np.float32), weight.name))
    monkeypatch.setattr(export.onnx_graph, "build_graph", lambda *_, **__: proto)
    with pytest.raises(ParityError, match="ONNX Runtime"):
        export_onnx(exported() / "model.pt", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nan_fails_and_ties_do_not(exported):
    folder = exported()
    case = Case("x", (1, 1, 1), float("nan"), 0.0, 1.0, 0, 0)
    assert list(export.parity._case_problems(case, Thresholds()))
    tie = Case("x", (1, 1, 1), 1e-7, 1e-8, 0.5, 7, 0)
    assert not list(export.parity._case_problems(tie, Thresholds()))
    strict = check_parity(folder / "model.pt", folder / "model.onnx", thresholds=Thresholds(score_max=0.0))
    assert not strict.passed


def test_real_images_are_used(exported, shared):
    folder = exported()
    images = sorted((shared / "data" / "camvid" / "images").glob("**/*.*"))[:2]
    report = check_parity(folder / "model.pt", folder / "model.onnx", images)
    assert report.passed
    named = [case.source for case in report.cases if case.source != "pattern"]
    assert named == [image.name for image in images]


def test_bad_models(write, exported, tmp_path, capfd):
    content = (exported() / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("cut.pt", "text.pt", "absent.pt"):
        with pytest.raises(SystemExit) as exit_status:
            main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert exit_status.value.code == 1
        message = capfd.readouterr().err
        assert name in message
        assert "defect" not in message
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        export_onnx(exported() / "model.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is made for a model that cannot be read"
    with pytest.raises(ExportError, match="no multiple of the network's stride 32; pass --size 96"):
        export_onnx(write(tmp_path / "swin.pt", "swin_tiny_patch4_window7_224"), tmp_path / "out", size=100)


@pytest.mark.parametrize("size", [16400, 100000, 100001, 2**70])
def test_a_size_that_no_card_may_have_is_refused_before_the_work(exported, tmp_path, capsys, monkeypatch, size):
    monkeypatch.setattr(export.onnx_graph, "load_model", None)
    with pytest.raises(SystemExit) as ended:
        main([str(exported() / "model.pt"), "--out", str(tmp_path / "out"), "--size", str(size)])
    assert ended.value.code == 1
    assert f"model.pt: size {size} is too large, expected at most 16384; pass a smaller" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensors_of_another_network(exported, tmp_path):
    data = torch.load(exported() / "model.pt", weights_only=True)
    data["state_dict"]["decoder.narrow.weight"] = torch.zeros(1)
    torch.save(data, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"decoder\.narrow\.weight has shape \(1,\)"):
        export_onnx(tmp_path / "model.pt", tmp_path / "out")


def test_a_folder_that_cannot_be_written(exported, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(exported() / "model.pt", tmp_path / "file")


@pytest.mark.parametrize("arguments", [["m.pt", "--opset", "11"], ["m.pt", "--format", "tflite"], []])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    message = capsys.readouterr().err
    assert "--help" in message or "Known are onnx, engine, openvino, triton" in message
