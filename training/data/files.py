"""What readers of files share: images, label PNGs and points by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import PIXEL_KINDS, Color, Problem, counted
from training.data.reading import check_labels, files_by_stem, image_size, read_image, read_json, read_label_map
from wsss_deploy.card import IGNORE_INDEX, default_palette
from wsss_deploy.errors import DataError
from wsss_deploy.image_files import image_name

_PNG = frozenset({".png"})


class FileSource:
    """Images, label PNGs, points and tags by name; readers fill the tables. See `DataSource` for the methods.

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
        self._points: dict[str, list[dict[str, Any]]] = {}
        self._tags: dict[str, tuple[int, ...]] = {}
        self._ids = {name: index for index, name in enumerate(classes)}

    @property
    def image_names(self) -> tuple[str, ...]:
        """All images, whether in a split or not."""
        return tuple(self._images)

    def kinds(self, name: str) -> frozenset[str]:
        """Which kinds of labels the image has."""
        found = {kind for kind, files in self._labels.items() if name in files}
        if name in self._points:
            found.add("points")
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
        if path is None and kind == "points" and name in self._points:
            return self._draw_points(name)
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

    def _read_points(self) -> dict[str, list[dict[str, Any]]]:
        """Points of points.json by image name."""
        points: dict[str, list[dict[str, Any]]] = {}
        for name, items in self._read_mapping("points.json").items():
            if isinstance(items, list) and all(isinstance(item, dict) for item in items):
                points[name] = items
            else:
                self._problem("points.json", f"'{name}': expected a list of objects with x, y and cls")
        return points

    def _draw_points(self, name: str) -> NDArray[np.uint8]:
        size = image_size(self.image_path(name))
        labels = np.full(size, IGNORE_INDEX, np.uint8)
        for item in self._points[name]:
            where = f"{self._root / 'points.json'}: '{name}'"
            x, y, index = item.get("x"), item.get("y"), self._class_id(item.get("cls"))
            if not isinstance(x, int | float) or not isinstance(y, int | float):
                raise DataError(f"{where}: point {item}: expected numbers x and y, pixels from the top left")
            if index is None:
                classes = ", ".join(self.classes)
                raise DataError(
                    f"{where}: point {item}: unknown class in cls; expected an id below {len(self.classes)} or one of "
                    f"{classes}"
                )
            if not (0 <= x < size[1] and 0 <= y < size[0]):
                raise DataError(f"{where}: point ({x}, {y}) is outside the image of {size[1]}x{size[0]} pixels")
            labels[int(y), int(x)] = index
        return labels

    def _read_mapping(self, file: str) -> dict[str, Any]:
        """The part of a JSON object that is about images of this set; {} without the file."""
        path = self._root / file
        if not path.is_file():
            return {}
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: holds a {type(content).__name__}, expected an object from image name to labels")
        entries: dict[str, list[str]] = {}
        for entry in content:
            entries.setdefault(image_name(entry, self._images), []).append(entry)
        self._report_unknown(file, [entry for name in entries if name not in self._images for entry in entries[name]])
        repeated = [name for name in entries if name in self._images and len(entries[name]) > 1]
        if repeated:
            first = " and ".join(f"'{entry}'" for entry in entries[repeated[0]])
            have = f"{counted(len(repeated), 'image')} {'has' if len(repeated) == 1 else 'have'} more than one entry"
            self._problem(file, f"{have} (first: {first} for image '{repeated[0]}'); keep one")
        return {name: content[given[0]] for name, given in entries.items() if name in self._images}

    def _report_unknown(self, file: str, entries: list[str]) -> None:
        """Report entries of a JSON file that are for no image."""
        if entries:
            text = f"{counted(len(entries), 'entry')} for no known image (first: '{entries[0]}')"
            self._problem(file, f"{text}; add the image or remove the entry", blocking=False)

    def _class_id(self, value: object) -> int | None:
        if isinstance(value, str):
            return self._ids.get(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.classes):
            return value
        return None

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
