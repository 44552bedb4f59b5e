"""Arguments that cannot work are told before the network is loaded."""

from __future__ import annotations

import os
import shlex
import time

import pytest
from PIL import Image

import export.onnx_graph
from export.cli import main
from export.patterns import pattern_image
from export.scratch import STALE, scratch_folder

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py


@pytest.fixture
def checked(monkeypatch, exported, capsys):
    """Run the command, which may not come to the export; gives the exit status and the message."""

    def begun(*_, **__):
        raise AssertionError("the export has begun")

    monkeypatch.setattr(export.onnx_graph, "export_onnx", begun)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(exported() / "model.pt"), *map(str, arguments)])
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("--format onnx,triton --max-batch 0", 2, "max_batch is 0, expected at least 1"),
        ("--format onnx,triton --instances -4", 2, "instances is -4"),
        ("--format onnx,triton --name a/b", 2, "model name 'a/b'"),
        ("--format onnx,triton --name .x", 2, "model name '.x'"),
        ("--instances -4", 2, "--instances is for --format triton; add that format"),
        ("--max-batch 4", 2, "--max-batch is for --format triton"),
        ("--name roads", 2, "--name is for --format triton"),
        ("--shapes 1x1x1/1x64x64/1x64x64", 2, "--shapes is for --format engine"),
        ("--split val", 2, "--split is for --data"),
        ("--size 100", 1, "size 100 is no multiple of the network's stride 16; pass --size 96"),
        ("--images nofolder", 1, "nofolder"),
        ("--data nodata", 1, "nodata: has no splits/val.txt"),
        ("--format engine --shapes 1x2x3", 2, "expected MIN/BEST/MAX"),
        ("--format engine --shapes 1x1x1/1x8x8/1x8x8", 2, "expected at least 16 pixels a side of MAX"),
        ("--format engine --size 64 --shapes 1x1x1/1x64x64/1x128x64", 2, "takes images up to 64 pixels a side"),
        ("--format engine --shapes 1x112x112/1x112x112/4x128x128", 2, "480 x 640 becomes 80 x 96"),
        ("--format engine,triton --max-batch 8 --shapes 1x1x1/1x96x96/4x96x96", 2, "the engine takes 4 images"),
    ],
)
def test_what_cannot_work_is_told_at_once(checked, line, code, message):
    status, told = checked(*shlex.split(line))
    assert message in told
    assert status == code
    assert "defect" not in told


def test_what_builds_has_to_be_there(checked, monkeypatch):
    from wsss_deploy.backends import tensorrt

    def absent(name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", absent)
    status, told = checked("--format", "engine")
    assert (status, "needs an NVIDIA driver" in told) == (1, True)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    status, told = checked("--format", "openvino")
    assert (status, "pip install 'wsss-deploy[openvino]'" in told) == (2, True)


def test_a_broken_image_is_named_before_the_work(checked, tmp_path):
    for index in range(12):
        Image.fromarray(pattern_image(20, 30, index)).save(tmp_path / f"{index:02}.png")
    (tmp_path / "10.png").write_bytes(b"no image")  # neither of the first eight, nor judged on
    status, told = checked("--precision", "int8", "--images", tmp_path)
    assert status == 1
    assert "10.png" in told
    assert "--precision" not in told


def test_a_repository_that_is_none(checked, tmp_path):
    (tmp_path / "triton" / "roads").mkdir(parents=True)
    (tmp_path / "triton" / "roads" / "file").write_text("keep")
    status, told = checked("--format", "triton", "--name", "roads", "--out", tmp_path)
    assert (status, "is no Triton model" in told) == (1, True)


def test_folders_of_killed_exports_go_after_a_day(tmp_path):
    old, young = tmp_path / ".export-old", tmp_path / ".export-young"
    for folder in (old, young, tmp_path / "other"):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"part")
    long_ago = time.time() - STALE - 1
    os.utime(old, (long_ago, long_ago))
    os.utime(tmp_path / "other", (long_ago, long_ago))
    with scratch_folder(tmp_path, ".export-") as scratch:
        assert scratch.is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, scratch.name, "other"])
    assert not scratch.exists()
