from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from training import quickstart as module
from training.data.synthetic import CLASSES
from training.quickstart import PRODUCTS, quickstart
from wsss_deploy import Segmenter
from wsss_deploy.errors import ExportError, TrainingError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, quickstart(out, seed=1, iterations=3, scenes=(8, 2), show=False)


@pytest.mark.slow
def test_everything_is_there_and_agrees(finished):
    out, summary = finished
    assert sorted(path.name for path in out.iterdir()) == sorted([*PRODUCTS, "data", "run"])
    assert tuple(summary.iou) == CLASSES
    assert 0 <= summary.miou <= 1
    report = json.loads((out / "parity.json").read_text())
    assert report["agreement"] > 0.99
    for name in ("model.pt", "model.onnx"):
        card = Segmenter(out / name).card
        assert card.classes == CLASSES
        assert card.protocol.method == "gated_crf"
        assert card.protocol.supervision == ("scribbles",)
        assert card.protocol.weights == "none"
        metrics = card.protocol.metrics
        expected = metrics.get("val_refined_miou", metrics["val_miou"])  # what the exported model does by default
        assert expected == pytest.approx(summary.miou, abs=0.01)
    with Image.open(out / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 900
    text = module._report(summary)
    assert text.splitlines()[-1] == f"mIoU {summary.miou:.4f}"
    assert "wsss-predict" in text
    assert "wsss-demo" in text


@pytest.mark.slow
def test_a_finished_folder_is_left_alone(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(TrainingError, match=r"already holds model\.pt; choose another --out, or delete"):
        quickstart(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_failed_export_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def fail(model, out):
        raise ExportError("no agreement")

    monkeypatch.setattr(module, "_export", fail)
    with pytest.raises(ExportError):
        quickstart(tmp_path / "out", iterations=1, scenes=(2, 1), show=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]


@pytest.mark.parametrize("moved", [(), ("data", "run"), ("data", "run", "model.pt")])
def test_a_run_that_was_killed_starts_over(tmp_path, monkeypatch, moved):
    out = tmp_path / "out"
    for name in moved:
        if name in PRODUCTS:
            out.mkdir(exist_ok=True)
            (out / name).write_text("old")
        else:
            (out / name).mkdir(parents=True)
    (out / ".unfinished" / "data").mkdir(parents=True)
    (out / ".unfinished" / "data" / "classes.txt").write_text("half")

    def export(model, folder):
        shutil.copy(model, folder / "model.onnx")
        (folder / "parity.json").write_text("{}")

    # The export's own tests run it; here only its files matter.
    monkeypatch.setattr(module, "_export", export)
    monkeypatch.setattr("wsss_deploy.Segmenter", lambda path: Segmenter(path.with_name("model.pt")))
    quickstart(out, iterations=1, scenes=(2, 1), show=False)
    assert sorted(path.name for path in out.iterdir()) == sorted([*PRODUCTS, "data", "run"])
    assert (out / "model.pt").read_bytes() != b"old"


def test_a_failing_export_command_is_reported(tmp_path):
    with pytest.raises(ExportError, match=r"the export failed: .*absent"):
        module._export(tmp_path / "absent.pt", tmp_path)


def test_the_command_refuses_a_file_as_folder_in_two_lines(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "training.quickstart", "--out", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "choose another --out" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr
