"""The data contract: what a data set gives to training, evaluation and the checker, whatever its layout on disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsss_deploy.errors import DataError, UsageError

KINDS = ("masks", "scribbles", "points", "tags")
PIXEL_KINDS = ("masks", "scribbles", "points")

Color: TypeAlias = tuple[int, int, int]
Layout: TypeAlias = Literal["auto", "folder", "voc", "coco"]

_BACKGROUND_NAMES = {"background", "_background_", "__background__", "bg"}


@dataclass(frozen=True)
class Problem:
    """Something about a data set that a person should know.

    Attributes:
        where: The file, relative to the data set.
        text: What was found, what was expected, what to do.
        severity: "error" makes the image or the set unusable as it is; "remark" does not.
        blocking: Whether the set cannot even be opened for training (a split that names a missing image does, a
            label without an image does not).
    """

    where: str
    text: str
    severity: Literal["error", "remark"] = "error"
    blocking: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class DataSource(Protocol):
    """A data set. Images go by name (the file's name without its ending); label maps are uint8, 255 = unlabelled."""

    @property
    def name(self) -> str:
        """Name of the folder, never a path."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the id."""
        ...

    @property
    def palette(self) -> tuple[Color, ...]:
        """One RGB colour per class."""
        ...

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Image names by split."""
        ...

    def kinds(self, name: str) -> frozenset[str]:
        """Which of `KINDS` the image has."""
        ...

    def image_path(self, name: str) -> Path:
        """The image's file."""
        ...

    def load_image(self, name: str) -> NDArray[np.uint8]:
        """The image, RGB uint8 (H, W, 3), upright.

        Raises:
            DataError: The file cannot be read; it is named.
        """
        ...

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels of one of `PIXEL_KINDS`, uint8 (H, W) of the upright image's size, ids below K or 255.

        Raises:
            DataError: The image has no such labels, or the file is unusable; it is named.
        """
        ...

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Ids of the classes that are in the image (background left out), or None where nobody said."""
        ...


class WrappedSource(ABC):
    """A data set like another one in all but its labels.

    Args:
        source: The other one.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self._source.classes

    @property
    def palette(self) -> tuple[Color, ...]:
        """One colour per class."""
        return self._source.palette

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Image names by split."""
        return self._source.splits

    @abstractmethod
    def kinds(self, name: str) -> frozenset[str]:
        """See `DataSource.kinds`."""

    def image_path(self, name: str) -> Path:
        """The image's file."""
        return self._source.image_path(name)

    def load_image(self, name: str) -> NDArray[np.uint8]:
        """The image, RGB uint8 (H, W, 3)."""
        return self._source.load_image(name)

    @abstractmethod
    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """See `DataSource.load_labels`."""

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Class ids of the image's tags."""
        return self._source.tags(name)


class CheckedSource(DataSource, Protocol):
    """A data set as a reader leaves it: with all problems that the structure (not the pixels) shows."""

    @property
    def problems(self) -> Sequence[Problem]:
        """Found while opening."""
        ...

    @property
    def image_names(self) -> tuple[str, ...]:
        """All images, whether in a split or not."""
        ...


def counted(number: int, noun: str) -> str:
    """A number with its noun, for messages: "1 image", "2 images"."""
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else many}"


def has_background(classes: Sequence[str]) -> bool:
    """Whether class 0 is the background, which tags leave out."""
    return bool(classes) and classes[0].strip().lower() in _BACKGROUND_NAMES


def open_dataset(path: str | os.PathLike[str], format: str = "auto") -> DataSource:
    """Open a data set.

    Args:
        path: Its folder.
        format: Layout: "folder" (images/, masks/, ..., classes.txt), "voc" (devkit), "coco" (JSON), or "auto",
            which looks for `JPEGImages`, then for `annotations/*.json`, and else takes "folder".

    Raises:
        DataError: The folder is missing, has another layout, or its structure cannot be used; `problems` lists all.
        UsageError: Unknown `format`.
    """
    source = read_dataset(path, format)
    blocking = [str(problem) for problem in source.problems if problem.blocking]
    if blocking:
        more = f" (and {len(blocking) - 3} more)" if len(blocking) > 3 else ""
        raise DataError(f"{source.name}: {'; '.join(blocking[:3])}{more}; wsss-check lists everything", blocking)
    return source


def read_dataset(path: str | os.PathLike[str], format: str = "auto") -> CheckedSource:
    """Open a data set but leave its structural problems in `problems` instead of raising; for the checker.

    Args and errors are those of `open_dataset`.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.is_file() else "no such folder"
        raise DataError(f"{root}: {found}; expected a data set folder (see docs/data.md)")
    layout = detect_layout(root) if format == "auto" else format
    if layout not in _READERS:
        raise UsageError(f"unknown data set format '{layout}'; expected auto, {', '.join(_READERS)}")
    return _READERS[layout](root)


def detect_layout(root: Path) -> str:
    """The layout that the folder's entries speak for; "folder" when nothing speaks for another.

    Args:
        root: An existing folder.
    """
    if (root / "images").is_dir() and (root / "classes.txt").is_file():
        return "folder"
    if any(any(root.glob(pattern)) for pattern in ("JPEGImages", "*/JPEGImages", "*/*/JPEGImages")):
        return "voc"
    if any(any(root.glob(pattern)) for pattern in ("annotations/*.json", "*/_annotations.coco.json")):
        return "coco"
    return "folder"


def _folder(root: Path) -> CheckedSource:
    from training.data.folder import FolderSource

    return FolderSource(root)


def _voc(root: Path) -> CheckedSource:
    from training.data.voc import VocSource

    return VocSource(root)


def _coco(root: Path) -> CheckedSource:
    from training.data.coco import CocoSource

    return CocoSource(root)


# Imported on demand: each reader imports the contract above.
_READERS: dict[str, Callable[[Path], CheckedSource]] = {"folder": _folder, "voc": _voc, "coco": _coco}
