"""Reader of the folder layout, the project's own.

    images/NAME.jpg|png|...   required
    masks/NAME.png            pixel values are class ids, 255 = unlabelled; so are those of
    scribbles/NAME.png
    points/NAME.png           (without that file: points.json, {name: [{"x": px, "y": px, "cls": id or class name}]})
    tags.json                 {name: [id or class name, ...]}
    classes.txt               required; line number = class id, from 0
    splits/SPLIT.txt          one name a line; without any split, all images are the split "train"

Every image has what it has: kinds of labels may differ from image to image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import PIXEL_KINDS, Color, Problem
from training.data.reading import (
    IMAGE_SUFFIXES,
    check_size,
    files_by_stem,
    image_size,
    read_image,
    read_json,
    read_label_map,
    read_lines,
    read_palette,
)
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError

_PNG = frozenset({".png"})


class FolderSource:
    """A data set in the folder layout; see `DataSource` for the methods.

    Args:
        root: The folder.

    Raises:
        DataError: There are no images, or no usable classes.txt or JSON; lesser faults go to `problems`.
    """

    def __init__(self, root: Path) -> None:
        self.name = root.resolve().name
        self._root = root
        self.problems: list[Problem] = []
        self.classes = read_classes(root / "classes.txt")
        self._ids = {name: index for index, name in enumerate(self.classes)}
        self._images = self._read_images()
        self._labels = {kind: self._read_label_files(kind) for kind in PIXEL_KINDS}
        self._points = self._read_points()
        self._tags = self._read_tags()
        self.splits: Mapping[str, tuple[str, ...]] = self._read_splits()
        files = [path for kind in PIXEL_KINDS for path in list(self._labels[kind].values())[:1]]
        self.palette: tuple[Color, ...] = read_palette(files, len(self.classes))

    def kinds(self, name: str) -> frozenset[str]:
        """Which kinds of labels the image has."""
        found = {kind for kind in PIXEL_KINDS if name in self._labels[kind]}
        if name in self._points:
            found.add("points")
        if name in self._tags:
            found.add("tags")
        return frozenset(found)

    def image_path(self, name: str) -> Path:
        """The image's file."""
        try:
            return self._images[name]
        except KeyError:
            raise DataError(f"{self.name}: no image named '{name}' in images/") from None

    def load_image(self, name: str) -> NDArray[np.uint8]:
        """RGB uint8 (H, W, 3), upright."""
        return read_image(self.image_path(name))

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels uint8 (H, W)."""
        size = image_size(self.image_path(name))
        path = self._labels.get(kind, {}).get(name)
        if path is not None:
            return check_size(read_label_map(path, len(self.classes)), size, str(path))
        if kind == "points" and name in self._points:
            return self._draw_points(name, size)
        raise DataError(f"{self.name}: image '{name}' has no {kind}; it has {', '.join(sorted(self.kinds(name)))}")

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Ids from tags.json, ascending."""
        return self._tags.get(name)

    def _problem(self, where: str, text: str, blocking: bool = True) -> None:
        self.problems.append(Problem(where, text, blocking=blocking))

    def _read_images(self) -> dict[str, Path]:
        found = files_by_stem(self._root / "images", IMAGE_SUFFIXES)
        if not found:
            raise DataError(
                f"{self._root}: no images; expected images/*.jpg (or png, ...) beside classes.txt, masks/, scribbles/, ..."
            )
        for paths in found.values():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                self._problem(f"images/{paths[0].name}", f"the same name occurs {len(paths)} times ({names}); keep one")
        return {name: paths[0] for name, paths in found.items()}

    def _read_label_files(self, kind: str) -> dict[str, Path]:
        labels: dict[str, Path] = {}
        for name, paths in files_by_stem(self._root / kind, _PNG).items():
            if name in self._images:
                labels[name] = paths[0]
            else:
                self._problem(f"{kind}/{paths[0].name}", "label without an image of that name; add it", blocking=False)
        folder = self._root / kind
        entries = folder.iterdir() if folder.is_dir() else ()
        strays = sorted(path.name for path in entries if path.suffix.lower() != ".png" and path.name[0] != ".")
        if strays:
            text = f"{len(strays)} files are no PNG (first: {strays[0]}) and are not read; save labels as PNG"
            self._problem(f"{kind}/", text, blocking=False)
        return labels

    def _read_points(self) -> dict[str, list[dict[str, Any]]]:
        path = self._root / "points.json"
        if not path.is_file():
            return {}
        points: dict[str, list[dict[str, Any]]] = {}
        for name, items in _mapping(path).items():
            if name not in self._images:
                self._problem("points.json", f"names the image '{name}', which images/ lacks", blocking=False)
                continue
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                self._problem("points.json", f"'{name}': expected a list of objects with x, y and cls")
                continue
            points[name] = items
        return points

    def _draw_points(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        labels = np.full(size, IGNORE_INDEX, np.uint8)
        for item in self._points[name]:
            where = f"{self._root / 'points.json'}: '{name}'"
            x, y, index = item.get("x"), item.get("y"), self._class_id(item.get("cls"))
            if not isinstance(x, int | float) or not isinstance(y, int | float) or index is None:
                raise DataError(f"{where}: point {item}: expected numbers x, y and a known class in cls")
            if not (0 <= x < size[1] and 0 <= y < size[0]):
                raise DataError(f"{where}: point ({x}, {y}) is outside the image of {size[1]}x{size[0]} pixels")
            labels[int(y), int(x)] = index
        return labels

    def _read_tags(self) -> dict[str, tuple[int, ...]]:
        path = self._root / "tags.json"
        if not path.is_file():
            return {}
        tags: dict[str, tuple[int, ...]] = {}
        for name, values in _mapping(path).items():
            if name not in self._images:
                self._problem("tags.json", f"names the image '{name}', which images/ lacks", blocking=False)
                continue
            values = values if isinstance(values, list) else [values]
            ids = [self._class_id(value) for value in values]
            unknown = [repr(value) for value, index in zip(values, ids, strict=True) if index is None]
            if unknown:
                text = f"'{name}' has the unknown tag {', '.join(unknown)}; expected ids below {len(self.classes)} or names"
                self._problem("tags.json", text)
            tags[name] = tuple(sorted({index for index in ids if index is not None}))
        return tags

    def _class_id(self, value: object) -> int | None:
        if isinstance(value, str):
            return self._ids.get(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.classes):
            return value
        return None

    def _read_splits(self) -> dict[str, tuple[str, ...]]:
        splits: dict[str, tuple[str, ...]] = {}
        for path in sorted((self._root / "splits").glob("*.txt")):
            names = [self._strip_suffix(line) for line in read_lines(path) if line]
            splits[path.stem] = unique_names(names, self._images, f"splits/{path.name}", self.problems)
        return splits or {"train": tuple(self._images)}

    def _strip_suffix(self, line: str) -> str:
        # Lists often carry file names; a name may hold dots of its own, so the plain name goes first.
        path = Path(line)
        return path.stem if line not in self._images and path.suffix.lower() in IMAGE_SUFFIXES else line


def unique_names(
    names: Sequence[str], images: Mapping[str, Path], where: str, problems: list[Problem]
) -> tuple[str, ...]:
    """Names of a split that exist, each once; the others are added to `problems`.

    Args:
        names: As listed.
        images: Known images.
        where: The list's file.
        problems: Extended in place.
    """
    kept = dict.fromkeys(name for name in names if name in images)
    missing = list(dict.fromkeys(name for name in names if name not in images))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        text = f"names images that do not exist: {', '.join(missing[:3])}{more}; add them or take them off the list"
        problems.append(Problem(where, text, blocking=True))
    repeated = len(names) - len(kept) - sum(name not in images for name in names)
    if repeated:
        problems.append(Problem(where, f"{repeated} names are listed more than once; each counts once", "remark"))
    if not kept and not missing:
        problems.append(Problem(where, "is empty; list one image name a line or remove the file", blocking=True))
    return tuple(kept)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names of a classes.txt.

    Raises:
        DataError: It is missing, has gaps or repeated names, or fewer than 2 or more than 255 classes.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; write one class name a line, the line number (from 0) is the class id")
    lines = read_lines(path)
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is empty, but its number is a class id; name the class")
    repeated = sorted({name for name in lines if lines.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: class names occur twice ({', '.join(repeated)}); expected unique names")
    if not 2 <= len(lines) <= 255:
        raise DataError(f"{path}: {len(lines)} classes, expected 2 to 255 (with the background, if there is one)")
    return tuple(lines)


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object from image name to labels")
    return content
