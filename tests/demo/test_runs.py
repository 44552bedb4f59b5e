"""The queue of trainings: one at a time in a folder, whoever has started it; with a stand-in for the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import runs as module
from demo.runs import RunLock, Runs, Settings
from wsss_deploy.errors import WsssError

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no file locks that a command inherits")

SETTINGS = Settings("auto", next(iter(module.NETWORKS)), 100)
#: Trains until there is a file `go`; complains where another one does so in the same data set.
STAND_IN = """
import pathlib, signal, sys, time
module, data, run = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
if module == "export.cli":
    (run / "model.onnx").touch()
    raise SystemExit
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
try:
    (data / "working").touch(exist_ok=False)
except FileExistsError:
    (data / "mixed").touch()
try:
    print("trains", flush=True)
    while not (run / "go").exists():
        time.sleep(0.02)
    (run / "model.pt").touch()
finally:
    (data / "working").unlink(missing_ok=True)
"""
#: A demo that is killed in the middle of its run.
DEMO = """
import pathlib, sys, threading
from demo import runs
data, stand_in = pathlib.Path(sys.argv[1]), sys.argv[2]
run = str(data / "runs" / "run-001")
runs._command = lambda module, *arguments: [sys.executable, "-c", stand_in, module, str(data), run]
runs.Runs(data).start(runs.Settings("auto", next(iter(runs.NETWORKS)), 100))
threading.Event().wait()
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    def command(name, *arguments):
        run = arguments[arguments.index("--out") + 1]
        return [sys.executable, "-c", STAND_IN, name, str(tmp_path), run]

    monkeypatch.setattr(module, "_command", command)
    return tmp_path


@pytest.fixture
def demo(data):
    """Make the queue of another demo on the same folder; all are closed at the end."""
    made = []

    def make() -> Runs:
        made.append(Runs(data))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


@pytest.fixture
def orphan(data):
    """A run whose demo was killed while it trained; gives the number of its process."""
    killed = subprocess.Popen([sys.executable, "-c", DEMO, str(data), STAND_IN], cwd=Path(module.__file__).parents[1])
    try:
        until(lambda: (data / "working").exists())
        until(lambda: (holder := RunLock(data / "runs").holder()) is not None and holder.process)
    finally:
        killed.kill()
        killed.wait()
    number = RunLock(data / "runs").holder().process
    yield number
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def no_locks(*_) -> None:
    raise OSError("not supported")


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def state(queue: Runs, name: str) -> str:
    return queue.status(name).state


@needs_locks
def test_what_a_killed_demo_left_is_seen_as_running_and_not_resumed(data, demo, orphan):
    restarted = demo()
    status = restarted.status("run-001")
    assert (status.state, status.elsewhere) == ("training", True)
    assert restarted.states() == [("run-001", "training (started elsewhere)")]
    with pytest.raises(WsssError, match="run-001 is training"):
        restarted.resume("run-001")
    (data / "runs" / "run-001" / "go").touch()
    until(lambda: state(restarted, "run-001") == "stopped")  # trained; what is left is the export
    restarted.resume("run-001")
    until(lambda: state(restarted, "run-001") == "done")
    assert not (data / "mixed").exists()


@needs_locks
def test_what_a_killed_demo_left_is_stopped(data, demo, orphan):
    restarted = demo()
    restarted.stop("run-001")
    until(lambda: state(restarted, "run-001") == "stopped")
    assert not (data / "working").exists()  # it ended in order
    assert not restarted.status("run-001").elsewhere
    with pytest.raises(WsssError, match="nothing to stop"):
        restarted.stop("run-001")


@needs_locks
def test_what_does_not_stop_is_ended(data, demo, orphan, monkeypatch):
    monkeypatch.setattr(module, "_STOP_SECONDS", 0)
    os.kill(orphan, signal.SIGSTOP)  # no longer listens
    restarted = demo()
    restarted.stop("run-001")
    until(lambda: state(restarted, "run-001") == "stopped")


@needs_locks
def test_a_run_waits_for_what_a_killed_demo_left(data, demo, orphan):
    restarted = demo()
    name = restarted.start(SETTINGS)
    assert name == "run-002"
    (data / "runs" / name / "go").touch()
    assert state(restarted, name) == "queued"
    assert state(restarted, "run-001") == "training"
    (data / "runs" / "run-001" / "go").touch()
    until(lambda: state(restarted, name) == "done")
    assert not (data / "mixed").exists()


@needs_locks
def test_a_waiting_run_is_stopped_and_the_demo_ends(data, demo, orphan):
    restarted = demo()
    first, second = restarted.start(SETTINGS), restarted.start(SETTINGS)
    restarted.stop(first)
    assert [state(restarted, name) for name in (first, second)] == ["stopped", "queued"]
    restarted.close()  # does not wait for the other demo's run
    assert state(restarted, "run-001") == "training"


@needs_locks
def test_two_demos_on_one_folder_take_turns(data, demo):
    one, other = demo(), demo()
    first = one.start(SETTINGS)
    until(lambda: (data / "working").exists())
    second = other.start(SETTINGS)
    assert first != second
    assert [state(other, name) for name in (first, second)] == ["training", "queued"]
    assert other.status(first).elsewhere
    assert not one.status(first).elsewhere
    (data / "runs" / second / "go").touch()
    other.stop(first)
    until(lambda: state(one, first) == "stopped")  # not failed: somebody has asked for it
    until(lambda: state(other, second) == "done")
    assert state(one, second) == "done"
    (data / "runs" / first / "go").touch()
    other.resume(first)
    until(lambda: state(one, first) == "done")  # although it was stopped here
    assert not (data / "mixed").exists()


@needs_locks
def test_the_record_alone_stops_nobody(data, demo):
    queue = demo()
    name = queue.start(SETTINGS)
    until(lambda: (data / "working").exists())
    (data / "runs" / name / "go").touch()
    until(lambda: state(queue, name) == "done")
    (data / "runs" / "run-002").mkdir()
    (data / "runs" / "run-002" / "page.json").write_text((data / "runs" / name / "page.json").read_text())
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        # A record that was left by a process which was killed; its number is another's by now.
        lock = RunLock(data / "runs")
        assert lock.take("run-002")
        lock.record("run-002", bystander.pid)
        with pytest.raises(WsssError, match="does not listen"):  # locked, but not by that one
            demo().stop("run-002")
        lock.release()
        assert state(demo(), "run-002") == "stopped"  # the record is still there, the lock is not
        with pytest.raises(WsssError, match="nothing to stop"):
            demo().stop("run-002")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@needs_locks
def test_a_run_on_another_machine_is_left_alone(data, demo, orphan, monkeypatch):
    monkeypatch.setattr(module.platform, "node", lambda: "another")
    with pytest.raises(WsssError, match="was started on the machine"):
        demo().stop("run-001")


def test_without_locks_a_demo_keeps_its_own_queue(data, demo, monkeypatch):
    if sys.platform != "win32":
        monkeypatch.setattr(module.fcntl, "flock", no_locks)
    queue = demo()
    first, second = queue.start(SETTINGS), queue.start(SETTINGS)
    until(lambda: (data / "working").exists())
    assert [state(queue, name) for name in (first, second)] == ["training", "queued"]
    assert not queue.status(first).elsewhere
    for name in (first, second):
        (data / "runs" / name / "go").touch()
    until(lambda: state(queue, second) == "done")
    assert not (data / "mixed").exists()


def test_until_the_first_step_the_page_says_that_it_loads(data, demo):
    queue = demo()
    name = queue.start(SETTINGS)
    folder = data / "runs" / name
    until(lambda: (data / "working").exists())
    until(lambda: "trains" in (folder / "console.txt").read_text())
    assert queue.status(name).note == "loading libraries and images, then on from iteration 0"
    with (folder / "console.txt").open("a") as console:
        console.write("features: 30 of 120 images\n")  # of a stage before the first step
    assert queue.status(name).note == "features: 30 of 120 images"
    (folder / "log.csv").write_text("iteration,figure,value\n10,loss/total,1.5\n")
    assert queue.status(name).note == "features: 30 of 120 images"
    queue.stop(name)
    until(lambda: state(queue, name) == "stopped")
    assert queue.status(name).note == "features: 30 of 120 images"

    queue.resume(name)  # the figures of before are no step of this process
    until(lambda: (folder / "console.txt").read_text().count("trains") == 2)
    assert queue.status(name).note == "loading libraries and images, then on from iteration 10"
    with (folder / "console.txt").open("a") as console:
        console.write("20/100  total 1.2\n")
    assert queue.status(name).note == "20/100  total 1.2"


def test_a_folder_that_cannot_be_locked_fails_the_run_not_the_queue(data, demo):
    queue = demo()
    (data / "runs" / ".lock").mkdir(parents=True)
    name = queue.start(SETTINGS)
    until(lambda: state(queue, name) == "failed")
    (data / "runs" / ".lock").rmdir()
    (data / "runs" / name / "go").touch()
    queue.resume(name)
    until(lambda: state(queue, name) == "done")


def test_the_preview_takes_the_next_image_that_can_be_read(tmp_path, monkeypatch, color_segmenter):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")
    from demo import preview
    from demo.files import PageFiles
    from demo.folder import AnnotatedFolder
    from demo.train_tab import _Handlers

    root = tmp_path / "data"
    for folder in ("images", "scribbles", "runs/run-001"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("background\nbox\nlid\n")
    for name in "abcd":
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "images" / f"{name}.png")
    Image.new("P", (30, 20), 1).save(root / "scribbles" / "a.png")
    folder = AnnotatedFolder(root)
    (root / "images" / "b.png").write_bytes(b"no image")
    (root / "runs" / "run-001" / "checkpoint.pt").touch()
    (root / "runs" / "run-001" / "page.json").write_text(
        '{"supervision": "auto", "network": "Small, from scratch", "iterations": 9}'
    )
    opened = []
    monkeypatch.setattr(preview, "_open", lambda state, *_: (opened.append(state), (color_segmenter, 7))[1])
    runs = Runs(root)
    handlers = _Handlers(folder, runs, PageFiles(tmp_path / "files"))

    def label() -> str:
        shown = handlers.show("run-001")[4]
        assert shown.visible
        return shown.label

    assert label() == "Prediction after 7 iterations: c"
    assert label() == "Prediction after 7 iterations: c"
    assert len(opened) == 1  # the same state is not read again
    (root / "images" / "c.png").unlink()
    os.utime(root / "runs" / "run-001" / "checkpoint.pt", (1, 1))
    assert label() == "Prediction after 7 iterations: d"
    (root / "images" / "d.png").unlink()
    os.utime(root / "runs" / "run-001" / "checkpoint.pt", (2, 2))
    assert label() == "Prediction after 7 iterations: a"  # labelled, but better than none
    (root / "images" / "a.png").unlink()
    os.utime(root / "runs" / "run-001" / "checkpoint.pt", (3, 3))
    assert not handlers.show("run-001")[4].visible
