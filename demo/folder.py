"""The folder that is annotated: images in, labels out, in the layout of docs/data.md.

A name that comes from the browser is looked up among the images that were found here, and never becomes a path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.card import IGNORE_INDEX, palette_bytes
from wsss_deploy.drawing import is_background
from wsss_deploy.errors import DataError, ImageError, UsageError
from wsss_deploy.files import atomic_write
from wsss_deploy.image_files import find_images, image_name, read_palette
from wsss_deploy.images import image_size, load_image
from wsss_deploy.segmentation import write_png
from wsss_deploy.text import has_controls

logger = logging.getLogger(__name__)

#: Kinds that the page draws; each has a folder of its own.
KINDS = ("scribbles", "points")
_LABEL_FOLDERS = ("masks", *KINDS)

Labels = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
Stamp = tuple[int | None, ...]
Read = TypeVar("Read")


class Conflict(DataError):
    """Labels that somebody else has changed in the meantime; theirs are kept."""


@dataclass(frozen=True)
class Progress:
    """How far the annotation is: images that have any label, of all images.

    Args:
        done: Images that have any label.
        total: All images.
        by_masks: Those of `done` whose only labels are whole masks, which this page does not show.
    """

    done: int
    total: int
    by_masks: int = 0


class AnnotatedFolder:
    """A data set in the folder layout that is being labelled; safe to use from many threads.

    Args:
        root: The folder; it has to hold `images/` with at least one image.

    Raises:
        UsageError: It does not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        paths = self._find()
        if not paths:
            raise UsageError(f"--data {root}: holds no images; put photos into {root / 'images'}")
        self._images: dict[str, Path] = {}
        for path in paths:
            if path.stem in self._images:
                names = f"{self._images[path.stem].name} and {path.name}"
                raise UsageError(f"--data {root}: {names} have one name and would share their labels; rename one")
            self._images[path.stem] = path
        self._lock = threading.Lock()
        self._palettes: dict[tuple[str, ...], tuple[Color, ...]] = {}

    def _find(self) -> list[Path]:
        try:
            return find_images([self.root / "images"]) if (self.root / "images").is_dir() else []
        except ImageError:
            return []

    def rescan(self) -> None:
        """Look for images that have come or gone; while there are none, those that were there stay listed."""
        found: dict[str, Path] = {}
        for path in self._find():
            # The page is open already: a second image of one name does not close it, and is left out.
            known = found.setdefault(path.stem, path)
            if known != path:
                logger.warning("%s and %s would share their labels; rename one", known.name, path.name)
        self._images = found or self._images

    @property
    def name(self) -> str:
        """What the folder is called, without where it lies."""
        return self.root.name

    @property
    def names(self) -> tuple[str, ...]:
        """Images, sorted."""
        return tuple(self._images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id; empty until there is a classes.txt."""
        try:
            lines = (self.root / "classes.txt").read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("classes.txt: cannot be read; write one class name a line, in UTF-8") from error
        return check_classes([line.strip() for line in "\n".join(lines).rstrip().splitlines()])

    @property
    def palette(self) -> tuple[Color, ...]:
        """Colours by class id: those of labels that are there already, else the VOC colour map."""
        classes = self.classes
        known = self._palettes.get(classes)
        if known is None:
            folders = (self.root / kind for kind in _LABEL_FOLDERS)
            files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.png"))[:1]]
            known = self._palettes[classes] = read_palette(files, len(classes))
        return known

    def name_classes(self, text: str) -> tuple[str, ...]:
        """Write classes.txt, once: labels that exist would change their meaning.

        Args:
            text: One name a line; the line number, from 0, is the class id.

        Raises:
            DataError: There is one already, or the names are not usable.
        """
        classes = typed_classes(text)
        with self._lock:
            if (self.root / "classes.txt").exists():
                raise DataError("classes.txt exists already; reload the page")
            with atomic_write(self.root / "classes.txt") as file:
                file.write(("\n".join(classes) + "\n").encode())
        return classes

    def path(self, name: object) -> Path:
        """The file of an image.

        Raises:
            DataError: There is none of that name.
        """
        images = self._images  # one and the same, also while another thread looks for new ones
        if isinstance(name, str) and name in images:
            return images[name]
        raise DataError("no such image in this folder; reload the page")

    def image(self, name: object) -> npt.NDArray[np.uint8]:
        """The upright image, uint8 (H, W, 3).

        Raises:
            DataError, ImageError: There is none of that name, or it cannot be read; the message names the file, not
                where it lies.
        """
        return self._read(name, load_image)

    def size(self, name: object) -> tuple[int, int]:
        """Height and width of the upright image, from the header.

        Raises:
            DataError, ImageError: There is none of that name, or it cannot be read.
        """
        return self._read(name, image_size)

    def _read(self, name: object, reader: Callable[[Path], Read]) -> Read:
        path = self.path(name)
        try:
            return reader(path)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), path.name)) from error

    def labels(self, name: str, kind: str, size: tuple[int, int]) -> Labels:
        """Labels of an image; all 255 where there are none.

        Args:
            name: Of the image.
            kind: One of `KINDS`.
            size: Height and width of the upright image.

        Returns:
            uint8 (H, W).

        Raises:
            DataError: The file does not follow the contract; it is left as it is.
        """
        file = self._label_file(name, kind)
        if not file.is_file():
            return self._listed_points(name, size) if kind == "points" else np.full(size, IGNORE_INDEX, np.uint8)
        try:
            with Image.open(file) as image:
                mode, values = image.mode, np.asarray(image)
        except Exception as error:  # Pillow's readers raise almost anything
            raise DataError(f"{kind}/{file.name}: cannot be read; repair or remove it") from error
        if mode not in ("P", "L") or values.shape != size:
            raise DataError(
                f"{kind}/{file.name}: {mode} image of {values.shape[1]} × {values.shape[0]}, expected a palette or "
                f"grey one of {size[1]} × {size[0]}; repair or remove it"
            )
        self._check_ids(values, f"{kind}/{file.name}")
        return values.astype(np.uint8)

    def save_labels(self, name: object, kind: object, labels: Labels, revision: object) -> str:
        """Replace the labels of an image, whole or not at all.

        Args:
            name: Of the image.
            kind: One of `KINDS`.
            labels: uint8 (H, W).
            revision: Of the labels that these replace, see `revision`.

        Returns:
            The new revision. Labels that lie there already are no conflict: the page may ask again when it has missed
            the answer.

        Raises:
            Conflict: The file on disk is another one by now.
            DataError: The labels do not fit.
        """
        self.path(name)
        if kind not in KINDS:
            raise DataError("unknown kind of label; reload the page")
        assert isinstance(name, str)
        assert isinstance(kind, str)
        self._check_ids(labels, kind)
        file = self._label_file(name, kind)
        with self._lock:
            # The old labels are only read where they are compared: another size would be a defect of the caller.
            there = _revision(self.labels(name, kind, labels.shape))
            if there != revision and there != _revision(labels):
                raise Conflict("these labels were changed elsewhere, their newer state is shown")
            if (labels != IGNORE_INDEX).any() or (kind == "points" and name in self._by_image("points.json")):
                image = Image.fromarray(labels)
                image.putpalette(palette_bytes(self.palette))
                write_png(file, image)
            else:
                file.unlink(missing_ok=True)
        return _revision(labels)

    @staticmethod
    def revision(labels: Labels) -> str:
        """What tells these labels from others."""
        return _revision(labels)

    def stamp(self, name: str) -> Stamp:
        """When the files that hold strokes and points of an image were changed, None where there is none."""
        found: list[int | None] = []
        for file in (*(self._label_file(name, kind) for kind in KINDS), self.root / "points.json"):
            try:
                found.append(file.stat().st_mtime_ns)
            except OSError:
                found.append(None)
        return tuple(found)

    def tags(self, name: str) -> list[int]:
        """Class ids that are ticked for an image."""
        classes = self.classes
        listed = self._by_image("tags.json").get(name, [])
        ids = [classes.index(tag) if tag in classes else tag for tag in (listed if isinstance(listed, list) else [])]
        return sorted({tag for tag in ids if type(tag) is int and 0 <= tag < len(classes)})

    def save_tags(self, name: object, tags: object) -> list[int]:
        """Replace the tags of an image; those of others stay as they are.

        Args:
            name: Of the image.
            tags: Class ids; none removes the entry.

        Raises:
            DataError: An id is not that of a tag.
        """
        self.path(name)
        assert isinstance(name, str)
        allowed = self.taggable()
        if not isinstance(tags, list) or not all(type(tag) is int and tag in allowed for tag in tags):
            raise DataError("unknown tag; reload the page")
        with self._lock:
            content = {
                entry: value
                for entry, value in self._json("tags.json").items()
                if image_name(entry, self._images) != name
            }
            if tags:
                content[name] = sorted(set(tags))
            with atomic_write(self.root / "tags.json") as file:
                file.write((json.dumps(dict(sorted(content.items())), ensure_ascii=False, indent=1) + "\n").encode())
        return sorted(set(tags))

    def taggable(self) -> list[int]:
        """Class ids that can be tags: all but a background at 0."""
        classes = self.classes
        return [index for index in range(len(classes)) if index or not is_background(classes[0])]

    def labelled(self) -> frozenset[str]:
        """Images that have any label."""
        return self._labelled_in(_LABEL_FOLDERS)

    def drawn(self) -> frozenset[str]:
        """Images that have strokes or points."""
        return self._labelled_in(KINDS, ("points.json",))

    def progress(self) -> Progress:
        """How far the annotation is."""
        done = len(self.labelled())
        return Progress(done, len(self._images), done - len(self._labelled_in(KINDS)))

    def _labelled_in(
        self, folders: Sequence[str], files: Sequence[str] = ("tags.json", "points.json")
    ) -> frozenset[str]:
        """Images that have labels in one of these folders or lists."""
        found = {path.stem for folder in folders for path in (self.root / folder).glob("*.png")}
        for file in files:
            found.update(image_name(entry, self._images) for entry in self._json(file))
        return frozenset(found & self._images.keys())

    def _label_file(self, name: str, kind: str) -> Path:
        return self.root / kind / f"{name}.png"

    def _check_ids(self, labels: npt.NDArray[Any], where: str) -> None:
        wrong = (labels >= len(self.classes)) & (labels != IGNORE_INDEX)
        if wrong.any():
            raise DataError(
                f"{where}: holds the value {int(labels[wrong][0])}, expected class ids below {len(self.classes)} or 255"
            )

    def _json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.root / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: is no readable JSON; repair or remove it") from error
        if not isinstance(content, dict):
            raise DataError(f"{file}: expected an object from image name to labels; repair or remove it")
        return content

    def _by_image(self, file: str) -> dict[str, Any]:
        """Entries of a JSON file by the image that they mean, as `wsss-train` takes them: with its ending or without.

        Raises:
            DataError: Two mean the same image.
        """
        entries: dict[str, Any] = {}
        for entry, value in self._json(file).items():
            name = image_name(entry, self._images)
            if name in entries:
                raise DataError(f"{file}: has more than one entry for the image '{name}'; keep one")
            entries[name] = value
        return entries

    def _listed_points(self, name: str, size: tuple[int, int]) -> Labels:
        labels = np.full(size, IGNORE_INDEX, np.uint8)
        listed = self._by_image("points.json").get(name, [])
        for point in listed if isinstance(listed, list) else []:
            try:
                x, y, index = int(point["x"]), int(point["y"]), _class_id(point["cls"], self.classes)
                if not (0 <= x < size[1] and 0 <= y < size[0] and 0 <= index < len(self.classes)):
                    raise ValueError("outside")
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"points.json: a point of '{name}' is not usable; see wsss-check") from error
            labels[y, x] = index
        return labels


def typed_classes(text: str) -> tuple[str, ...]:
    """Class names from what was typed, one a line; empty lines are left out.

    Raises:
        DataError: They cannot be used.
    """
    return check_classes([line.strip() for line in text.splitlines() if line.strip()])


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names that can be used.

    Raises:
        DataError: They cannot.
    """
    if "" in classes:
        raise DataError(f"classes: line {list(classes).index('') + 1} is empty, but its number is a class id; name it")
    for index, name in enumerate(classes):
        if has_controls(name):
            raise DataError(f"classes: line {index + 1}, {name!a}, holds control characters; name it without them")
    if len(set(classes)) != len(classes):
        raise DataError("classes: a name occurs twice; expected different names")
    if not 2 <= len(classes) <= 255:
        raise DataError(f"classes: found {len(classes)}, expected 2 to 255, one a line, the background first")
    return tuple(classes)


def decode_runs(runs: object, size: tuple[int, int]) -> Labels:
    """Labels from run lengths, as the page sends them.

    Args:
        runs: Value, count, value, count, ... along the rows.
        size: Height and width.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: They do not fill that size exactly.
    """
    if isinstance(runs, list) and all(type(number) is int and 0 <= number < 2**31 for number in runs):
        values, counts = np.asarray(runs[::2], np.int64), np.asarray(runs[1::2], np.int64)
        if len(values) == len(counts) and counts.sum() == size[0] * size[1] and (values <= IGNORE_INDEX).all():
            return np.repeat(values.astype(np.uint8), counts).reshape(size)
    raise DataError("the page sent labels that do not fit the image; reload it")


def encode_runs(labels: Labels) -> list[int]:
    """Run lengths of labels, see `decode_runs`."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    counts = np.diff(np.r_[starts, flat.size])
    return np.stack([flat[starts].astype(np.int64), counts], axis=1).ravel().tolist()


def _revision(labels: Labels) -> str:
    return hashlib.sha256(labels.tobytes()).hexdigest()[:16]


def _class_id(value: object, classes: Sequence[str]) -> int:
    if isinstance(value, str):
        return list(classes).index(value)
    if type(value) is int:
        return value
    raise ValueError("neither name nor id")


def as_mapping(value: object) -> Mapping[str, Any]:
    """What a request holds, if it is an object.

    Raises:
        DataError: It is not.
    """
    if isinstance(value, dict):
        return value
    raise DataError("the page sent something else than it should; reload it")
