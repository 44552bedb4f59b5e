"""Files that belong together take their names together, whatever comes in between."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from export.scratch import replace_together, write_synced
from wsss_deploy.engine_manifest import EngineManifest, manifest_path, read_engine, read_manifest
from wsss_deploy.errors import ArtifactError
from wsss_deploy.openvino_file import CARD_ENTRY, WEIGHTS_ENTRY, check_weights, weights_path


@pytest.fixture
def moves(tmp_path):
    """Three new files and their names, of which the first is free."""
    (tmp_path / "scratch").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "scratch" / name).write_text("new")
    for name in ("b", "c"):
        (tmp_path / name).write_text("old")
    return [(tmp_path / "scratch" / name, tmp_path / name) for name in ("a", "b", "c")]


def now(moves):
    return [target.read_text() if target.exists() else None for _, target in moves]


def test_all_are_replaced(moves):
    replace_together(*moves)
    assert now(moves) == ["new"] * 3


class Ended(Exception):
    pass


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_comes_afterwards(moves, monkeypatch, sent):
    def ended(number, frame):
        raise Ended(number)

    replace, seen = os.replace, []

    def interrupted(source, target):
        seen.append(now(moves))
        os.kill(os.getpid(), sent)
        replace(source, target)

    before = signal.signal(sent, ended)
    monkeypatch.setattr(os, "replace", interrupted)
    try:
        with pytest.raises(Ended) as caught:
            replace_together(*moves)
        assert signal.getsignal(sent) is ended
    finally:
        signal.signal(sent, before)
    assert caught.value.args == (sent,)
    assert now(moves) == ["new"] * 3
    assert len(seen) == 3


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_leaves_what_was_there(moves, monkeypatch, at, links):
    replace = os.replace

    def failing(source, target):
        if source == moves[at][0]:
            raise OSError("no space")
        replace(source, target)

    def no_link(source, target):
        raise PermissionError

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(OSError, match="no space"):
        replace_together(*moves)
    assert now(moves) == [None, "old", "old"]


@pytest.mark.parametrize("stuck", [0, 1])
def test_an_error_while_going_back_is_passed_over(moves, monkeypatch, stuck):
    replace, unlink = os.replace, Path.unlink

    def failing(source, target):
        if source == moves[2][0]:
            raise OSError("no space")
        if stuck == 1 and source.name == "b.before":
            raise PermissionError("stuck")
        replace(source, target)

    def stays(path, missing_ok=False):
        if stuck == 0 and path == moves[0][1]:
            raise PermissionError("stuck")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(Path, "unlink", stays)
    with pytest.raises(OSError, match="no space"):
        replace_together(*moves)
    assert now(moves) == [["new", "old", "old"], [None, "new", "old"]][stuck]


def test_what_is_moved_is_on_the_disk_before(moves, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    source, target = moves[1]
    write_synced(source, b"report")
    assert synced == [source.stat().st_ino]
    replace_together((source, target))
    assert target.read_text() == "report"


def test_a_name_that_is_a_folder(moves):
    moves[2][1].unlink()
    moves[2][1].mkdir()
    with pytest.raises(OSError, match="c"):
        replace_together(*moves)
    assert now(moves[:2]) == [None, "old"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from export.scratch import replace_together

    replace, left = os.replace, 1

    def killed(source, target):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(source, target)

    os.replace = killed
    paths = [Path(name) for name in sys.argv[1:]]
    replace_together(*((path.parent / "scratch" / path.name, path) for path in paths))
"""


def killed_between(*targets):
    """Replace files by those of one name in `scratch`, and be killed after the first."""
    line = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, targets)]
    assert subprocess.run(line, check=False).returncode == -signal.SIGKILL


def test_a_kill_between_weights_and_graph_is_told(tmp_path):
    model = tmp_path / "model.xml"
    (tmp_path / "scratch").mkdir()
    for folder, content in ((tmp_path, b"old"), (tmp_path / "scratch", b"new")):
        entries = {CARD_ENTRY: "{}", WEIGHTS_ENTRY: hashlib.sha256(content).hexdigest()}
        told = "".join(f'<{name} value="{value}"/>' for name, value in entries.items())
        (folder / "model.xml").write_text(f"<net><rt_info>{told}</rt_info></net>")
        (folder / "model.bin").write_bytes(content)
    check_weights(model)
    killed_between(weights_path(model), model)
    with pytest.raises(ArtifactError, match=r"model\.xml: model\.bin beside it belongs to another model.*was killed"):
        check_weights(model)


def test_a_kill_between_manifest_and_engine_is_told(tmp_path, tiny_card):
    engine = tmp_path / "model.engine"
    (tmp_path / "scratch").mkdir()
    for folder, content in ((tmp_path, b"old"), (tmp_path / "scratch", b"new")):
        manifest = EngineManifest(
            tensorrt="11.4.0",
            gpu="G",
            compute_capability="9.0",
            shapes=((1, 1, 1), (1, 64, 64), (4, 128, 128)),
            engine_sha256=hashlib.sha256(content).hexdigest(),
            onnx_sha256="0" * 64,
            command="wsss-export",
            card=tiny_card,
        )
        (folder / "model.engine").write_bytes(content)
        manifest_path(folder / "model.engine").write_text(manifest.model_dump_json())
    read_engine(engine, read_manifest(engine))
    killed_between(manifest_path(engine), engine)
    with pytest.raises(ArtifactError, match=r"is not the engine that its manifest speaks of.*killed.*: wsss-export"):
        read_engine(engine, read_manifest(engine))
