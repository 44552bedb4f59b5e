"""What readers of files share: images and label PNGs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import PIXEL_KINDS, Color, Problem, counted
from training.data.reading import check_labels, files_by_stem, image_size, read_image, read_label_map
from wsss_deploy.card import default_palette
from wsss_deploy.errors import DataError

_PNG = frozenset({".png"})


class FileSource:
    """Images, label PNGs and tags by name; readers fill the tables. See `DataSource` for the methods.

    Attributes:
        name: Name of the folder.
        classes: Class names.
        palette: One colour per class.
        splits: Image names by split.
        problems: What the structure shows.
    """

    def __init__(self, root: Path, classes: tuple[str, ...], images: Mapping[str, Path]) -> None:
        self.name = root.resolve().name
        self.classes = classes
        self.palette: tuple[Color, ...] = default_palette(len(classes))
        self.splits: Mapping[str, tuple[str, ...]] = {}
        self.problems: list[Problem] = []
        self._root = root
        self._images = images
        self._labels: dict[str, dict[str, Path]] = {kind: {} for kind in PIXEL_KINDS}
        self._tags: dict[str, tuple[int, ...]] = {}

    @property
    def image_names(self) -> tuple[str, ...]:
        """All images, whether in a split or not."""
        return tuple(self._images)

    def kinds(self, name: str) -> frozenset[str]:
        """Which kinds of labels the image has."""
        found = {kind for kind, files in self._labels.items() if name in files}
        return frozenset(found | ({"tags"} if name in self._tags else set()))

    def image_path(self, name: str) -> Path:
        """The image's file."""
        try:
            return self._images[name]
        except KeyError:
            raise DataError(f"{self.name}: has no image named '{name}'") from None

    def load_image(self, name: str) -> NDArray[np.uint8]:
        """RGB uint8 (H, W, 3), upright."""
        return read_image(self.image_path(name))

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels uint8 (H, W)."""
        path = self._labels.get(kind, {}).get(name)
        if path is None:
            has = ", ".join(sorted(self.kinds(name))) or "no labels"
            raise DataError(f"{self.name}: image '{name}' has no {kind}; it has {has}")
        size = image_size(self.image_path(name))
        return check_labels(read_label_map(path), str(path), size, len(self.classes))

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Ids of the classes in the image, ascending."""
        return self._tags.get(name)

    def _problem(self, where: str, text: str, blocking: bool = True) -> None:
        self.problems.append(Problem(where, text, blocking=blocking))

    def _label_files(self, folder: str) -> dict[str, Path]:
        """PNG files of a folder by image name; labels without an image and files of other kinds are problems."""
        labels: dict[str, Path] = {}
        for name, paths in files_by_stem(self._root / folder, _PNG).items():
            if name in self._images:
                labels[name] = paths[0]
            else:
                where = f"{folder}/{paths[0].name}"
                self._problem(where, "label without an image of that name; add the image", blocking=False)
        return labels

    def _report_strays(self, folder: str, expected: Sequence[str]) -> None:
        """Report files of a folder that nothing reads."""
        entries = (self._root / folder).iterdir() if (self._root / folder).is_dir() else ()
        strays = sorted(path.name for path in entries if path.suffix.lower() not in expected and path.name[0] != ".")
        if strays:
            text = f"{counted(len(strays), 'file')} not read, since not {' or '.join(expected)} (first: {strays[0]})"
            self._problem(f"{folder}/", text, blocking=False)

    def _split_names(self, names: Sequence[str], where: str) -> tuple[str, ...]:
        """Names of a split that exist, each once; the rest are problems.

        Args:
            names: As listed.
            where: The list's file.
        """
        kept = dict.fromkeys(name for name in names if name in self._images)
        missing = list(dict.fromkeys(name for name in names if name not in self._images))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            found = f"names images that do not exist: {', '.join(missing[:3])}{more}"
            self._problem(where, f"{found}; add them or take them off the list")
        repeated = len(names) - len(set(names))
        if repeated:
            text = f"{counted(repeated, 'name')} listed more than once; each counts once"
            self.problems.append(Problem(where, text, "remark"))
        if not names:
            self._problem(where, "is empty; list one image name a line or remove the file")
        return tuple(kept)
