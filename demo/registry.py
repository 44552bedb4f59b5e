"""The models that the page offers; a browser names one of them by its key, never by a path."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wsss_deploy.activation import CAMS
from wsss_deploy.artifact import read_card
from wsss_deploy.backends import can_run
from wsss_deploy.errors import WsssError

if TYPE_CHECKING:
    from wsss_deploy.segmenter import Segmenter

#: What a finished run holds, the first is the one to deploy.
_FILES = ("model.onnx", "model.pt")
_KEPT_OPEN = 3


class Models:
    """Models by key: the one that was given, files beside it, and those of the training runs.

    Args:
        given: A model that is open already; it stays open.
        files: Further model files.
        runs: Folder of training runs; looked through at every listing, so that new models appear.
    """

    def __init__(self, given: Segmenter | None = None, files: Sequence[Path] = (), runs: Path | None = None) -> None:
        self._given = given
        self._files = {f"{path.parent.resolve().name}/{path.name}": path for path in files}
        self._runs = runs
        self._open: OrderedDict[tuple[Path, bool | None], tuple[float, Segmenter]] = OrderedDict()
        self._lock = threading.Lock()
        self._given_key = None if given is None else str(given.describe()["model"])

    def keys(self) -> list[str]:
        """All models; the given one first, then files, then runs, the newest first."""
        given = [] if self._given_key is None else [self._given_key]
        return [*given, *(key for key in self._paths() if key not in given)]

    def default(self) -> str | None:
        """The model that is shown first; None if there is none yet."""
        return next(iter(self.keys()), None)

    def open(self, key: object, refine: bool | None = None) -> Segmenter:
        """A model, opened if it is not.

        Args:
            key: One of `keys`.
            refine: As in `Segmenter`.

        Raises:
            WsssError: There is none of that key, or it cannot be opened so.
        """
        if key is not None and key == self._given_key and self._given is not None:
            if refine is False and self._given.describe()["refinement"]["form"] != "none":
                raise WsssError("this model was handed over with its refinement on; hand it over as a file")
            return self._given
        path = self._paths().get(key) if isinstance(key, str) else None
        if path is None:
            if not self.keys():
                raise WsssError("there is no model yet; annotate some images and train one, in the tabs above")
            raise WsssError("this model is not offered (any more); choose another")
        return self._opened(path, refine)

    def _opened(self, path: Path, refine: bool | None) -> Segmenter:
        from wsss_deploy.segmenter import Segmenter

        with self._lock:
            changed = path.stat().st_mtime
            kept = self._open.pop((path, refine), None)
            if kept is None or kept[0] != changed:
                kept = (changed, Segmenter(path, refine=refine))
            self._open[path, refine] = kept
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
            return kept[1]

    def cams(self, key: object) -> Segmenter | None:
        """What gives the class activation maps that taught a model: `cams.pt` beside it; None without it or torch.

        Raises:
            WsssError: It cannot be opened.
        """
        path = self._paths().get(key) if isinstance(key, str) else None
        if path is None or path.name == CAMS or not (path.parent / CAMS).is_file():
            return None
        # The exported model runs without torch; its classifier does not.
        return self._opened(path.parent / CAMS, refine=False) if can_run("torch").available else None

    def fitting(self, classes: Sequence[str]) -> str | None:
        """The model that helps to annotate these classes: the newest run's, else the first that knows them."""
        paths = self._paths()
        runs = [key for key in paths if key not in self._files]
        if runs and self._knows(paths[runs[0]], classes):
            return runs[0]
        if self._given is not None and self._given.card.classes == tuple(classes):
            return self._given_key
        return next((key for key, path in paths.items() if self._knows(path, classes)), None)

    @staticmethod
    def _knows(path: Path, classes: Sequence[str]) -> bool:
        try:
            return read_card(path).classes == tuple(classes)
        except WsssError:
            return False

    def _paths(self) -> dict[str, Path]:
        found = dict(self._files)
        if self._runs is not None and self._runs.is_dir():
            for run in sorted(self._runs.iterdir(), reverse=True):
                found.update({f"{run.name}/{name}": run / name for name in _FILES if (run / name).is_file()})
        return found
