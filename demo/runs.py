"""Training and export as processes of their own, one after another; what happened is read back from their folders.

A run is a folder `runs/run-NNN` of the data set: `page.json` (what was asked for), `console.txt` (what the commands
said) and what `wsss-train` and `wsss-export` write. So the runs of an earlier demo are there again after a restart.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from wsss_deploy.errors import UsageError, WsssError
from wsss_deploy.files import atomic_write

SUPERVISIONS = ("auto", "scribbles", "points", "tags", "masks")
#: Kinds of network by what the page calls them, as arguments of wsss-train.
NETWORKS: dict[str, tuple[str, ...]] = {
    "Small, from scratch": ("--recipe", str(Path(__file__).with_name("small.yaml"))),
    "Pretrained (a download)": (),
}
MAX_ITERATIONS = 100_000
#: Seconds between two writes of the run's log and state; the curves grow this often.
_LOG_SECONDS = 10
#: Seconds that a stopped training gets to finish its step and save its state.
_STOP_SECONDS = 120

State = Literal["queued", "training", "exporting", "stopping", "stopped", "failed", "done"]
ACTIVE = frozenset({"queued", "training", "exporting", "stopping"})


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        supervision: One of `SUPERVISIONS`.
        network: A key of `NETWORKS`.
        iterations: Optimiser steps.
    """

    supervision: str
    network: str
    iterations: int

    def checked(self) -> Settings:
        """The same, if every value is one that the page offers.

        Raises:
            UsageError: It is not.
        """
        if self.supervision not in SUPERVISIONS or self.network not in NETWORKS:
            raise UsageError("unknown labels or network; reload the page")
        whole = isinstance(self.iterations, int | float) and float(self.iterations).is_integer()
        if not whole or not 1 <= self.iterations <= MAX_ITERATIONS:
            raise UsageError(f"iterations: expected a whole number from 1 to {MAX_ITERATIONS}")
        return replace(self, iterations=int(self.iterations))


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands.

    Attributes:
        name: Its folder.
        state: What it is doing.
        settings: What was asked for.
        iteration: Steps that are in the log.
        curves: Figures of the log: (iteration, value) by name.
        note: The last line of the commands.
    """

    name: str
    state: State
    settings: Settings
    iteration: int
    curves: dict[str, list[tuple[int, float]]]
    note: str


class Runs:
    """The queue of runs of one data set; safe to use from many threads.

    Args:
        data: The data set.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self.folder = data / "runs"
        self._states: dict[str, State] = {}
        self._queue: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False

    def names(self) -> list[str]:
        """All runs, the newest first."""
        found = self.folder.glob("run-*/page.json") if self.folder.is_dir() else []
        return sorted((path.parent.name for path in found), reverse=True)

    def start(self, settings: Settings) -> str:
        """Queue a new run.

        Returns:
            Its name.

        Raises:
            WsssError: The settings are not usable, or the folder cannot be written.
        """
        settings = settings.checked()
        with self._changed:
            if self._closed:
                raise WsssError("wsss-demo is stopping")
            numbers = [int(found[1]) for name in self._taken() if (found := re.fullmatch(r"run-(\d+)", name))]
            name = f"run-{max(numbers, default=0) + 1:03d}"
            with atomic_write(self.folder / name / "page.json") as file:
                file.write(json.dumps(asdict(settings)).encode())
            self._enqueue(name)
        return name

    def resume(self, name: object) -> None:
        """Queue a run that was stopped or failed; it goes on from its last saved state.

        Raises:
            WsssError: There is none of that name, or it is not in that condition.
        """
        with self._changed:
            known = self._known(name)
            if self._state(known) not in ("stopped", "failed"):
                raise WsssError(f"{known} is {self._state(known)}, only a stopped run can go on")
            self._enqueue(known)

    def stop(self, name: object) -> None:
        """Stop a run after its current step, or take it out of the queue.

        Raises:
            WsssError: There is none of that name, or it does not run.
        """
        with self._changed:
            known = self._known(name)
            state = self._state(known)
            if state == "queued":
                self._queue.remove(known)
                self._states[known] = "stopped"
            elif state in ("training", "exporting"):
                self._states[known] = "stopping"
                if self._process is not None:
                    self._process.send_signal(signal.SIGTERM)
            elif state != "stopping":
                raise WsssError(f"{known} is {state}, there is nothing to stop")

    def status(self, name: object) -> RunStatus:
        """How a run stands.

        Raises:
            WsssError: There is none of that name.
        """
        with self._changed:
            known = self._known(name)
            state = self._state(known)
        folder = self.folder / known
        curves = read_log(folder / "log.csv")
        iteration = max((point[0] for points in curves.values() for point in points), default=0)
        return RunStatus(known, state, self._settings(known), iteration, curves, last_line(folder / "console.txt"))

    def states(self) -> list[tuple[str, State]]:
        """All runs with their states, the newest first."""
        with self._changed:
            return [(name, self._state(name)) for name in self.names()]

    def close(self) -> None:
        """Stop what runs, and wait until its state is saved."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
            self._changed.notify_all()
            worker = self._worker
        if worker is not None:
            worker.join(_STOP_SECONDS + 10)

    def _taken(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def _known(self, name: object) -> str:
        if isinstance(name, str) and name in self.names():
            return name
        raise WsssError("no such run; reload the page")

    def _state(self, name: str) -> State:
        """In this process's memory, else what the files say."""
        folder = self.folder / name
        if name in self._states:
            return self._states[name]
        return "done" if (folder / "model.onnx").is_file() else "stopped"

    def _settings(self, name: str) -> Settings:
        try:
            return Settings(**json.loads((self.folder / name / "page.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise WsssError(f"{name}: page.json is damaged; start a new run") from error

    def _enqueue(self, name: str) -> None:
        self._states[name] = "queued"
        self._queue.append(name)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="wsss-demo-runs", daemon=True)
            self._worker.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                name = self._queue.pop(0)
                self._states[name] = "training"
            try:
                state = self._run(name)
            except (OSError, WsssError) as error:
                self._note(name, str(error))
                state = "failed"
            with self._changed:
                self._states[name] = state

    def _run(self, name: str) -> State:
        folder = self.folder / name
        model = folder / "model.pt"
        if not model.is_file():
            state = self._call(name, self._train_command(folder, self._settings(name).checked()))
            if state != "done":
                return state
        with self._changed:
            if self._states[name] == "stopping":
                return "stopped"
            self._states[name] = "exporting"
        return self._call(name, _command("export.cli", str(model), "--out", str(folder)))

    def _train_command(self, folder: Path, settings: Settings) -> list[str]:
        arguments = [str(self._data), "--out", str(folder), "--set", f"checkpoint_every={_LOG_SECONDS}"]
        if any(folder.rglob("checkpoint.pt")):
            return _command("training.cli", *arguments, "--resume")
        arguments += ["--supervision", settings.supervision, "--iterations", str(settings.iterations)]
        return _command("training.cli", *arguments, *NETWORKS[settings.network])

    def _call(self, name: str, command: Sequence[str]) -> State:
        with (self.folder / name / "console.txt").open("ab") as console:
            with self._changed:
                if self._closed or self._states[name] == "stopping":
                    return "stopped"
                # A session of its own: Ctrl-C in the terminal reaches the demo, which then stops it in order.
                self._process = process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
            status = self._wait(name, process)
        with self._changed:
            self._process = None
            if status == 0:
                return "done"
            return "stopped" if self._closed or self._states[name] == "stopping" else "failed"

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> int:
        waited = 0.0
        while True:
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                with self._changed:
                    stopping = self._closed or self._states[name] == "stopping"
                waited += 0.5 if stopping else 0.0
                if waited > _STOP_SECONDS:
                    process.kill()

    def _note(self, name: str, text: str) -> None:
        with (self.folder / name / "console.txt").open("a", encoding="utf-8") as console:
            console.write(f"{text}\n")


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The figures of a run's log.csv; rows that are being written this moment are left out.

    Args:
        path: The file; may be absent.

    Returns:
        (iteration, value) by figure, in the order of the file.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if len(row) == 3 and row[0].isdecimal():
                    try:
                        curves.setdefault(row[1], []).append((int(row[0]), float(row[2])))
                    except ValueError:
                        continue
    except (OSError, UnicodeDecodeError):
        return {}
    return curves


def _command(module: str, *arguments: str) -> list[str]:
    # -P: a folder `training` or `export` where the demo was started is not this package.
    return [sys.executable, "-P", "-m", module, *arguments]


def last_line(path: Path) -> str:
    """What a command said last; empty if it has said nothing.

    Args:
        path: Where its output goes.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
