"""Training and export as processes of their own, one after another; what happened is read back from their folders.

A run is a folder `runs/run-NNN` of the data set: `page.json` (what was asked for), `console.txt` (what the commands
said) and what `wsss-train` and `wsss-export` write. So the runs of an earlier demo are there again after a restart.
A process that works on a run holds a lock on `runs/.lock`; a demo recognises so what another one has started, or an
earlier one that was killed, and does not start a second one beside it.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from wsss_deploy.errors import UsageError, WsssError
from wsss_deploy.files import atomic_write

if sys.platform != "win32":
    import fcntl

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
#: Seconds between two looks at whether another process has ended.
_POLL_SECONDS = 0.5
#: The line that stands in console.txt before what a training says; its figure is the iteration that it goes on from.
_LOADING = "loading libraries and images, then on from iteration {}"
_LOADING_LINE = re.compile(re.escape(_LOADING).replace(r"\{\}", r"(\d+)"))
#: How wsss-train and wsss-export end after SIGTERM.
_TERMINATED = (130, -signal.SIGTERM)

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
        elsewhere: Whether another demo has started what works on it, or an earlier one that was killed.
    """

    name: str
    state: State
    settings: Settings
    iteration: int
    curves: dict[str, list[tuple[int, float]]]
    note: str
    elsewhere: bool = False


@dataclass(frozen=True)
class Holder:
    """What a locked `runs/.lock` says.

    Attributes:
        run: The run that is worked on.
        process: Number of the process, which leads a session of its own; None where it is not known.
        machine: Where it runs: the folder can be on a network drive.
    """

    run: str
    process: int | None
    machine: str


class RunLock:
    """At most one process works on the runs of a folder: the one that holds the lock on its file `.lock`.

    The commands inherit the open file, and the lock ends with the last process that has it open. So it outlives a demo
    that is killed, and never the work. Where the platform or the file system has no locks, one demo's own queue is
    all there is.

    Args:
        folder: The runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: int | None = None

    def take(self, run: str) -> bool:
        """Take the lock, unless another process has it.

        Args:
            run: What is to be worked on.

        Returns:
            Whether it is taken.

        Raises:
            OSError: The file cannot be written.
        """
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(file, exclusive=True):
            os.close(file)
            return False
        self._file = file
        self.record(run, None)
        return True

    def record(self, run: str, process: int | None) -> None:
        """Write down who works, for other demos."""
        assert self._file is not None
        text = json.dumps(asdict(Holder(run, process, platform.node())))
        # Of one length and in one call: a reader sees all of the old or all of the new.
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, text.encode().ljust(512))

    def release(self) -> None:
        """Give it back; a command that is still alive keeps it."""
        # Only closed: an explicit unlock would take it from the commands too.
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def inherited(self) -> tuple[int, ...]:
        """What a command has to inherit."""
        return () if self._file is None or sys.platform == "win32" else (self._file,)

    def holder(self) -> Holder | None:
        """Who has the lock; None if nobody has. The file alone says nothing, it stays when its writer is gone."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return None
        try:
            # Shared, so that two who look at once do not take each other for a holder.
            if _lock(file, exclusive=False):
                return None
            return Holder(**json.loads(os.read(file, 512)))
        except (OSError, ValueError, TypeError):
            return Holder("", None, "")
        finally:
            os.close(file)

    def signal(self, holder: Holder, number: int) -> bool:
        """Send a signal to the process that has the lock.

        Args:
            holder: Who was asked for; another one is left alone.
            number: The signal. SIGKILL goes to everything that the process has started.

        Returns:
            Whether it was sent.
        """
        if sys.platform == "win32" or holder.process is None or holder.machine != platform.node():
            return False
        if self.holder() != holder or not self._is_open_in(holder.process):
            return False
        try:
            if number == signal.SIGKILL:
                os.killpg(holder.process, number)
            else:
                os.kill(holder.process, number)
        except OSError:
            return False
        return True

    def _is_open_in(self, process: int) -> bool:
        """Whether a process has the file open: the number alone can be another's by now."""
        files = Path(f"/proc/{process}/fd")
        if not Path("/proc/self/fd").is_dir():
            try:
                return sys.platform != "win32" and os.getsid(process) == process
            except OSError:
                return False
        with suppress(OSError):
            for file in files.iterdir():
                with suppress(OSError):  # closed meanwhile
                    if file.samefile(self._path):
                        return True
        return False


def _lock(file: int, exclusive: bool) -> bool:
    """Lock an open file; False if another process has locked it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


class Runs:
    """The queue of runs of one data set; safe to use from many threads, and from many processes.

    Args:
        data: The data set.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self.folder = data / "runs"
        self._states: dict[str, State] = {}
        self._queue: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = RunLock(self.folder)
        self._asked: Holder | None = None  # to stop, of those that were started elsewhere
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
            name = self._claim(max(numbers, default=0) + 1)
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
            state = self._state(known, self._lock.holder())
            if state not in ("stopped", "failed"):
                raise WsssError(f"{known} is {state}, only a stopped run can go on")
            self._enqueue(known)

    def stop(self, name: object) -> None:
        """Stop a run after its current step, or take it out of the queue.

        Raises:
            WsssError: There is none of that name, or it does not run, or cannot be stopped from here.
        """
        with self._changed:
            known = self._known(name)
            holder = self._lock.holder()
            state = self._state(known, holder)
            if holder is not None and self._is_elsewhere(known, holder):
                self._stop_elsewhere(holder)
            elif state == "queued":
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
            holder = self._lock.holder()
            state, elsewhere = self._state(known, holder), self._is_elsewhere(known, holder)
        folder = self.folder / known
        curves = read_log(folder / "log.csv")
        iteration = _last_iteration(curves)
        lines = _last_lines(folder / "console.txt")
        note = lines[-1] if lines else ""
        if state == "training":
            note = _loading(lines, iteration) or note
        return RunStatus(known, state, self._settings(known), iteration, curves, note, elsewhere)

    def states(self) -> list[tuple[str, str]]:
        """All runs with their states in words, the newest first."""
        with self._changed:
            holder = self._lock.holder()
            return [
                (name, self._state(name, holder) + (" (started elsewhere)" if self._is_elsewhere(name, holder) else ""))
                for name in self.names()
            ]

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

    def _claim(self, number: int) -> str:
        """Make the folder of a new run; another demo may do so at the same time."""
        while True:
            folder = self.folder / f"run-{number:03d}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
            except OSError as error:
                raise WsssError(f"{folder}: cannot be written ({error.strerror or error})") from error
            else:
                return folder.name

    def _state(self, name: str, holder: Holder | None) -> State:
        """What this process does with it, else what another one does, else what the files say."""
        folder = self.folder / name
        own = self._states.get(name)
        if own in ACTIVE:
            return own
        if self._is_elsewhere(name, holder):
            if holder == self._asked:
                return "stopping"
            return "exporting" if (folder / "model.pt").is_file() else "training"
        # Before the memory: another demo may have brought to its end what was stopped here.
        if (folder / "model.onnx").is_file():
            return "done"
        return own or "stopped"

    def _is_elsewhere(self, name: str, holder: Holder | None) -> bool:
        return holder is not None and holder.run == name and self._states.get(name) not in ACTIVE

    def _stop_elsewhere(self, holder: Holder) -> None:
        if holder == self._asked:
            return
        if holder.machine not in ("", platform.node()):
            raise WsssError(f"{holder.run} was started on the machine {holder.machine}, stop it there")
        if not self._lock.signal(holder, signal.SIGTERM):
            raise WsssError(f"{holder.run} was started elsewhere and does not listen just now; try again")
        self._asked = holder
        threading.Thread(target=self._insist, args=(holder,), name="wsss-demo-stop", daemon=True).start()

    def _insist(self, holder: Holder) -> None:
        """End what does not stop in time."""
        end = time.monotonic() + _STOP_SECONDS
        with self._changed:
            while not self._closed and self._lock.holder() == holder:
                if time.monotonic() > end:
                    self._lock.signal(holder, signal.SIGKILL)
                    return
                self._changed.wait(_POLL_SECONDS)

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
        while (name := self._next()) is not None:
            try:
                state = self._run(name)
            except (OSError, WsssError) as error:
                state = self._failed(name, error)
            with self._changed:
                # First the lock: this process's own run must not look like another's.
                self._lock.release()
                self._states[name] = state

    def _next(self) -> str | None:
        """The first of the queue, when no other process works on a run of this folder; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return None
                name = self._queue[0]
                try:
                    taken = self._lock.take(name)
                except OSError as error:
                    self._queue.remove(name)
                    self._states[name] = self._failed(name, error)
                    continue
                if taken:
                    self._queue.remove(name)
                    self._states[name] = "training"
                    return name
                self._changed.wait(_POLL_SECONDS)

    def _run(self, name: str) -> State:
        folder = self.folder / name
        model = folder / "model.pt"
        if (folder / "model.onnx").is_file():  # made by another demo while this one waited
            return "done"
        if not model.is_file():
            self._note(name, _LOADING.format(_last_iteration(read_log(folder / "log.csv"))))
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
                    pass_fds=self._lock.inherited(),
                )
                self._lock.record(name, process.pid)
            status = self._wait(name, process)
        with self._changed:
            self._process = None
            self._lock.record(name, None)
            if status == 0:
                return "done"
            asked = self._closed or self._states[name] == "stopping" or status in _TERMINATED  # the last: elsewhere
            return "stopped" if asked else "failed"

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

    def _failed(self, name: str, error: Exception) -> State:
        with suppress(OSError):  # the folder may be gone, or full
            self._note(name, str(error))
        return "failed"


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


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines]


def _last_iteration(curves: dict[str, list[tuple[int, float]]]) -> int:
    return max((point[0] for points in curves.values() for point in points), default=0)


def _loading(lines: Sequence[str], iteration: int) -> str:
    """The line of a training that has not taken its first step yet; empty afterwards."""
    for line in reversed(lines):
        if re.match(r"\d+/\d+\s|[a-z -]+: \d+ of \d+ images", line):
            return ""
        if found := _LOADING_LINE.fullmatch(line):
            return line if iteration <= int(found[1]) else ""
    return ""
