"""What the annotation page asks the server for; every answer is plain data, also where something is wrong."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.asking import Place, outline, place_to_draw, with_strokes
from demo.folder import (
    KINDS,
    AnnotatedFolder,
    Color,
    Conflict,
    Stamp,
    as_mapping,
    decode_runs,
    encode_runs,
    typed_classes,
)
from demo.registry import Models
from demo.segmenting import SHOWN_SIDE
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.drawing import is_background
from wsss_deploy.errors import ImageError, WsssError
from wsss_deploy.segmentation import Segmentation
from wsss_deploy.upsampling import best_class

logger = logging.getLogger(__name__)

#: Seconds that a suggestion may take; images that were not looked at by then wait for the next one.
_SUGGESTION_SECONDS = 2.0
_PREDICTIONS_KEPT = 8
_LATE = "Nothing was found in time; ask again."
#: Requests that wait, for images as well as for predictions. Each holds one of the 40 threads that also serve the page.
_WAITING = 8


class Busy(WsssError):
    """Too many ask at once; the page asks again by itself."""


class Gate:
    """Lets a few in at once and a few more wait; further ones are turned away, so that memory and threads are bounded.

    What the annotation page asks for does not go through gradio's queue.

    Args:
        at_once: How many work at the same time.
        waiting: How many wait.
    """

    def __init__(self, at_once: int, waiting: int = _WAITING) -> None:
        self._working = threading.BoundedSemaphore(at_once)
        self._places = threading.BoundedSemaphore(at_once + waiting)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Wait until it is one's turn.

        Raises:
            Busy: Too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise Busy("The server is busy.")
        try:
            with self._working:
                yield
        finally:
            self._places.release()


class Annotating:
    """Server side of the annotation page.

    Args:
        folder: What is annotated.
        models: Where predictions come from.
    """

    def __init__(self, folder: AnnotatedFolder, models: Models) -> None:
        self._folder = folder
        self._models = models
        self._predictions: OrderedDict[tuple[str, str], Segmentation] = OrderedDict()
        self._uncertainty: dict[tuple[str, str], float] = {}
        # How unsure the model is of a place, for labels as they were then; and what was suggested for it.
        self._unsettled: dict[tuple[str, str], tuple[Stamp, float]] = {}
        self._suggested: dict[tuple[str, str], Stamp] = {}
        self._unreadable: dict[str, int] = {}  # when the file was changed that could not be read
        self._lock = threading.Lock()
        # Apart from each other, so that nobody's strokes wait for a model.
        self._files, self._model_runs = Gate(2), Gate(1)

    def functions(self) -> list[Callable[[Any], dict[str, Any]]]:
        """The functions that the page may call; each takes one object and returns one."""

        def start(request: Any) -> dict[str, Any]:
            return _answer(self._start, request, self._files)

        def name_classes(request: Any) -> dict[str, Any]:
            return _answer(self._name_classes, request, self._files)

        def open_image(request: Any) -> dict[str, Any]:
            return _answer(self._open, request, self._files)

        def save_labels(request: Any) -> dict[str, Any]:
            return _answer(self._save_labels, request, self._files)

        def save_tags(request: Any) -> dict[str, Any]:
            return _answer(self._save_tags, request, self._files)

        def suggest(request: Any) -> dict[str, Any]:
            return _answer(self._suggest, request, self._model_runs)

        def predict(request: Any) -> dict[str, Any]:
            return _answer(self._predict, request, self._model_runs)

        return [start, name_classes, open_image, save_labels, save_tags, suggest, predict]

    def _start(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folder = self._folder
        folder.rescan()
        labelled, names = folder.labelled(), folder.names
        classes = [
            {"name": name, "color": list(color)} for name, color in zip(folder.classes, folder.palette, strict=True)
        ]
        first = next((name for name in names if name not in labelled), names[0])
        return {
            "folder": folder.name,
            "classes": classes,
            "taggable": folder.taggable() if classes else [],
            "names": list(names),
            "first": first,
            **self._progress(),
        }

    def _name_classes(self, request: Mapping[str, Any]) -> dict[str, Any]:
        text = str(request.get("text", ""))
        first = typed_classes(text)[0]
        if not is_background(first) and request.get("confirmed") is not True:
            # Asked before anything is written: the classes stay, and training from tags would fail only much later.
            return {
                "warning": f"The first class is '{first}', expected 'background'. Without a background, image tags "
                "cannot be learnt from; points and scribbles can. Put 'background' on the first line, or press the "
                "button again to begin without it."
            }
        self._folder.name_classes(text)
        return self._start(request)

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name = self._folder.path(request.get("name")).stem
        image = self._folder.image(name)
        size = image.shape[:2]
        labels = {kind: self._folder.labels(name, kind, size) for kind in KINDS}
        return {
            "name": name,
            "width": size[1],
            "height": size[0],
            "image": _address(_shrunk(Image.fromarray(image)), "JPEG"),
            # As text: gradio looks at every number of a list, in the thread that serves all pages.
            "labels": {kind: ",".join(map(str, encode_runs(values))) for kind, values in labels.items()},
            "revisions": {kind: self._folder.revision(values) for kind, values in labels.items()},
            "tags": self._folder.tags(name),
            **self._progress(),
        }

    def _save_labels(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name, kind = request.get("name"), request.get("kind")
        labels = decode_runs(request.get("runs"), self._folder.size(name))
        revision = self._folder.save_labels(name, kind, labels, request.get("revision"))
        return {"revision": revision, **self._progress()}

    def _save_tags(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"tags": self._folder.save_tags(request.get("name"), request.get("tags")), **self._progress()}

    def _progress(self) -> dict[str, Any]:
        progress = self._folder.progress()
        return {
            "done": progress.done,
            "total": progress.total,
            "by_masks": progress.by_masks,
            "model": self._model(),
        }

    def _model(self) -> str | None:
        return self._models.fitting(self._folder.classes)

    def _suggest(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The image without labels that the model is least sure of; without a model, the next one.

        Where all have labels, see `_suggest_again`.
        """
        names = self._folder.names
        current = request.get("name")
        start = names.index(current) + 1 if current in names else 0
        labelled = self._folder.labelled()
        waiting = [name for name in (*names[start:], *names[:start]) if name not in labelled and name != current]
        model = self._model()
        deadline = time.monotonic() + _SUGGESTION_SECONDS
        known: dict[str, float] = {}
        for name in waiting:
            late = time.monotonic() > deadline
            if model is not None and (model, name) in self._uncertainty:
                known[name] = self._uncertainty[model, name]
            elif not late and self._can_be_read(name, model):
                if model is None:
                    return {"name": name, "reason": "The next image without labels."}
                known[name] = self._uncertainty[model, name]
        if not known:
            again = None if model is None else self._suggest_again(model, current, deadline)
            return again or {"name": None, "reason": self._nothing_left(waiting)}
        best = max(known, key=known.__getitem__)
        reason = f"The model is least sure of it (mean confidence {1 - known[best]:.2f}, of {len(known)} looked at)."
        return {"name": best, "reason": reason}

    def _suggest_again(self, model: str, current: object, deadline: float) -> dict[str, Any] | None:
        """Of the images with strokes or points the one with the largest and least sure place.

        None where there is none but what was suggested already and has the same labels still.
        """
        drawn, left, late = self._folder.drawn(), dict[str, float](), False
        for name in self._folder.names:
            stamp = self._folder.stamp(name)
            if name not in drawn or name == current or self._suggested.get((model, name)) == stamp:
                continue
            known = self._unsettled.get((model, name))
            if known is not None and known[0] == stamp:
                left[name] = known[1]
            elif time.monotonic() > deadline:
                late = True
            elif self._can_be_read(name, model):
                try:
                    left[name] = self._place(model, name)[-1]
                except WsssError:  # too large for strokes to be spread, or a label file that has to be repaired
                    left[name] = 0.0
        best = max(left, key=left.__getitem__, default=None)
        if best is None or not left[best]:
            return {"name": None, "reason": _LATE} if late else None
        self._suggested[model, best] = self._folder.stamp(best)
        reason = f"It has labels; the model is least sure of a part of it ({len(left)} looked at)."
        return {"name": best, "reason": reason}

    def _can_be_read(self, name: str, model: str | None) -> bool:
        """Whether an image can be suggested; with a model, what it makes of the image is known afterwards."""
        try:
            changed = self._folder.path(name).stat().st_mtime_ns
        except OSError:  # removed meanwhile
            return False
        if self._unreadable.get(name) == changed:
            return False
        try:
            if model is None:
                self._folder.image(name)
            else:
                self._scores(model, name)
        except ImageError:
            self._unreadable[name] = changed
            return False
        self._unreadable.pop(name, None)
        return True

    def _nothing_left(self, waiting: Sequence[str]) -> str:
        if not waiting:
            by_masks = self._folder.progress().by_masks
            return "Every image has labels" + (f", {by_masks} of them by masks only." if by_masks else ".")
        if all(name in self._unreadable for name in waiting):
            return f"Every other image has labels; {len(waiting)} without cannot be read."
        return _LATE

    def _predict(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the model sees, with the strokes so far spread along the image."""
        name = self._folder.path(request.get("name")).stem
        model = self._model()
        if model is None:
            return {"image": None, "reason": "No model of these classes yet."}
        result = self._scores(model, name)
        scores, place, _ = self._place(model, name)
        mask = best_class(scores, *_shown_size(result.mask.shape))[0]
        return {
            "image": _address(_tint(mask, self._folder.classes, self._folder.palette), "PNG"),
            "place": None if place is None else _marked(place, result.mask.shape),
            "model": model,
            "confidence": round(1 - self._uncertainty[model, name], 4),
            "milliseconds": round(sum(result.timing.values()), 1),
        }

    def _place(self, model: str, name: str) -> tuple[npt.NDArray[np.float32], Place | None, float]:
        """Scores with the strokes so far, what they are least sure of, and how much that is of the image."""
        result = self._scores(model, name)
        stamp = self._folder.stamp(name)  # before they are read: what is saved meanwhile is looked at anew
        strokes = [self._folder.labels(name, kind, result.mask.shape) for kind in reversed(KINDS)]
        scores = with_strokes(result, strokes)
        place = place_to_draw(scores, np.any([labels != IGNORE_INDEX for labels in strokes], axis=0))
        unsure = 0.0 if place is None else float(place.area.mean()) * (1 - place.confidence)
        self._unsettled[model, name] = (stamp, unsure)
        return scores, place, unsure

    def _scores(self, model: str, name: str) -> Segmentation:
        key = (model, name)
        with self._lock:  # one at a time: the processor is shared with whoever segments
            if key not in self._predictions:
                result = self._models.open(model).predict(self._folder.image(name))
                self._predictions[key] = result
                self._uncertainty[key] = float(1 - result.confidence.mean())
                while len(self._predictions) > _PREDICTIONS_KEPT:
                    self._predictions.popitem(last=False)
            return self._predictions[key]


def _answer(function: Callable[[Mapping[str, Any]], dict[str, Any]], request: object, gate: Gate) -> dict[str, Any]:
    try:
        with gate.entered():
            return function(as_mapping(request))
    except WsssError as error:
        return {"error": str(error), "conflict": isinstance(error, Conflict), "busy": isinstance(error, Busy)}
    except Exception as error:
        logger.exception("the annotation page asked for something that failed")
        return {"error": f"Unexpected {type(error).__name__}; the terminal of wsss-demo shows more.", "conflict": False}


def _marked(place: Place, shape: tuple[int, int]) -> dict[str, Any]:
    """The outline of a place, and its middle as parts of height and width."""
    return {"image": _address(Image.fromarray(outline(place.area, shape)), "PNG"), "center": list(place.center)}


def _tint(mask: npt.NDArray[np.uint8], classes: Sequence[str], palette: Sequence[Color]) -> Image.Image:
    """The mask in the brushes' colours; background stays clear."""
    named = zip(classes, palette, strict=True)
    colors = np.array([(*color, 0 if is_background(name) else 255) for name, color in named], np.uint8)
    return Image.fromarray(colors[mask])


def _shown_size(shape: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, SHOWN_SIDE / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _shrunk(image: Image.Image) -> Image.Image:
    height, width = _shown_size((image.height, image.width))
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)


def _address(image: Image.Image, form: str) -> str:
    """The image itself as an address, so that no file of the folder is ever served."""
    buffer = io.BytesIO()
    image.save(buffer, form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
