"""An export that is killed leaves no half artifact and does not hinder the next one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest

from wsss_deploy.artifact import read_card

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export(exported, tmp_path, sent):
    shutil.copy(exported() / "model.onnx", tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    line = [sys.executable, "-m", "export.cli", str(exported() / "model.pt"), "--out", str(tmp_path)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".export-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # into the tracing
    running.send_signal(sent)
    _, told = running.communicate()
    assert running.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 128 + signal.SIGTERM)
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert read_card(tmp_path / "model.onnx").name == "test_vit"
    if sent == signal.SIGTERM:
        assert [path.name for path in tmp_path.iterdir()] == visible, "nothing hidden is left"
        assert b"Traceback" not in told
