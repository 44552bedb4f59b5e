"""The model that the page makes by itself where it is given none: `wsss-quickstart`, once for this user.

It lies in the user's cache folder (about 20 MB with its drawn scenes), so that later starts have it at once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo.runs import last_line, read_log
from wsss_deploy.errors import WsssError

_ITERATIONS = 900
_STOP_SECONDS = 20

State = Literal["making", "ready", "failed"]


def cache_folder() -> Path:
    """Where it lies: `WSSS_CACHE`, else `wsss-deploy` in the user's cache folder."""
    if named := os.environ.get("WSSS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsss-deploy"


@dataclass(frozen=True)
class StarterStatus:
    """How far it is.

    Attributes:
        state: What there is.
        note: What its command said last.
        iteration: Steps of the training that are in its log.
        total: Steps of the whole training.
    """

    state: State
    note: str
    iteration: int
    total: int = _ITERATIONS


class Starter:
    """Makes the model in a process of its own, unless an earlier start has made it.

    Args:
        cache: Where it is kept.
        command: What makes it; the folder for its results is put at the end.
    """

    def __init__(self, cache: Path, command: tuple[str, ...] = ("-m", "training.quickstart", "--out")) -> None:
        self.model = cache / "starter" / "model.onnx"
        self._cache = cache
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._work: Path | None = None
        self._note = ""
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin; returns at once.

        Raises:
            WsssError: What trains is not installed, or the cache folder cannot be written.
        """
        if self.model.is_file():
            return
        if not all(map(_is_installed, ("torch", "onnxscript"))):
            raise WsssError(
                "no model given, and what trains one is not installed; pass the path of a model, or "
                "pip install 'wsss-deploy[export]'"
            )
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            # Two demos that start together make one each; the first to end stays.
            self._work = Path(tempfile.mkdtemp(prefix=".starter-", dir=self._cache))
        except OSError as error:
            raise WsssError(f"{self._cache}: cannot be written ({error.strerror}); set WSSS_CACHE") from error
        with (self._work / "console.txt").open("wb") as console:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self._command, str(self._work / "out")],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        threading.Thread(target=self._wait, name="wsss-demo-starter", daemon=True).start()

    def status(self) -> StarterStatus:
        """How far it is."""
        if self.model.is_file():
            return StarterStatus("ready", "", _ITERATIONS)
        if self._ended.is_set() or self._work is None:
            return StarterStatus("failed", self._note, 0)
        log = next(self._work.rglob("log.csv"), None)
        points = [] if log is None else [point[0] for curve in read_log(log).values() for point in curve]
        return StarterStatus("making", last_line(self._work / "console.txt"), max(points, default=0))

    def wait(self) -> StarterStatus:
        """Wait for the end."""
        if self._process is not None:
            self._ended.wait()
        return self.status()

    def close(self) -> None:
        """Stop; what is unfinished is deleted."""
        if self._process is None or self._ended.is_set():
            return
        self._process.terminate()
        if not self._ended.wait(_STOP_SECONDS):
            self._process.kill()
            self._ended.wait(_STOP_SECONDS)

    def _wait(self) -> None:
        assert self._process is not None
        assert self._work is not None
        status = self._process.wait()
        made = self._work / "out"
        try:
            if status == 0 and not self.model.is_file():
                shutil.rmtree(self.model.parent, ignore_errors=True)
                made.rename(self.model.parent)
            self._note = last_line(self._work / "console.txt")
        except OSError as error:
            self._note = f"cannot be kept: {error.strerror}"
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
            self._ended.set()


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # kept from being imported
        return False
