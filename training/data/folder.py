"""Reader of the folder layout, the project's own.

    images/NAME.jpg|png|...   required
    masks/NAME.png            pixel values are class ids, 255 = unlabelled; so are those of
    scribbles/NAME.png
    points/NAME.png           (without that file: points.json, {name: [{"x": px, "y": px, "cls": id or class name}]})
    tags.json                 {name: [id or class name, ...]}
    classes.txt               required; line number = class id, from 0
    splits/SPLIT.txt          one name a line; without any split, all images are the split "train"

In JSON files and lists, NAME may carry the image's ending.
Every image has what it has: kinds of labels may differ from image to image.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from training.data.dataset import PIXEL_KINDS, Problem, counted, has_background
from training.data.files import FileSource
from training.data.reading import IMAGE_SUFFIXES, files_by_stem, read_lines
from training.data.unread import UnreadFiles
from wsss_deploy.errors import DataError
from wsss_deploy.image_files import read_palette

# What people name the file of the tags, by the name's two halves; None stands for any ending.
_TAG_FILES: dict[str, frozenset[str] | None] = {
    "tags": None,
    "tag": None,
    "labels": frozenset({".json", ".csv", ".tsv", ".xlsx"}),
    "label": frozenset({".json", ".csv", ".tsv", ".xlsx"}),
}


class FolderSource(FileSource):
    """A data set in the folder layout.

    Args:
        root: The folder.

    Raises:
        DataError: There are no images, or no usable classes.txt or JSON; lesser faults go to `problems`.
    """

    def __init__(self, root: Path) -> None:
        found = files_by_stem(root / "images", IMAGE_SUFFIXES)
        self._unread = UnreadFiles(root / "images")
        if not found:
            raise DataError(
                f"{root}: no images; expected images/*.jpg (or png, ...) beside classes.txt, masks/, scribbles/, ..."
                + "".join(f"; images: {text}" for text in self._unread.remarks())
            )
        classes = read_classes(root / "classes.txt")
        super().__init__(root, classes, {name: paths[0] for name, paths in found.items()})
        for paths in found.values():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                self._problem(f"images/{paths[0].name}", f"the same name occurs {len(paths)} times ({names}); keep one")
        self.problems += [Problem("images", text, "remark") for text in self._unread.remarks()]
        for kind in PIXEL_KINDS:
            self._labels[kind] = self._label_files(kind)
            self._report_strays(kind, [".png"])
        self._points = self._read_points()
        self._tags = self._read_tags()
        self.splits = self._read_splits()
        files = [path for labels in self._labels.values() for path in list(labels.values())[:1]]
        self.palette = read_palette(files, len(classes))

    def _read_tags(self) -> dict[str, tuple[int, ...]]:
        self._report_other_tag_files()
        tags: dict[str, tuple[int, ...]] = {}
        unknown: dict[str, list[str]] = {}
        for name, values in self._read_mapping("tags.json").items():
            listed = values if isinstance(values, list) else [values]
            ids = [self._class_id(value) for value in listed]
            for tag in {repr(value): None for value, index in zip(listed, ids, strict=True) if index is None}:
                unknown.setdefault(tag, []).append(name)
            # The background is in every image, whether or not somebody says so.
            left_out = {None, 0} if has_background(self.classes) else {None}
            tags[name] = tuple(sorted({index for index in ids if index is not None} - left_out))
        # A misspelling is seldom alone: one line for each, not one for each image.
        for tag, names in unknown.items():
            found = f"unknown tag {tag} in {counted(len(names), 'image')} (first: '{names[0]}')"
            expected = f"expected ids below {len(self.classes)} or names of classes.txt"
            self._problem("tags.json", f"{found}; {self._nearest_class(tag)}{expected}")
        return tags

    def _nearest_class(self, tag: str) -> str:
        """A guess at the class that an unknown tag means, as the beginning of a sentence; "" without one."""
        # Names that differ in case only are classes of their own; the first is as good a guess as the others.
        known = {name.lower(): name for name in reversed(self.classes)}
        near = difflib.get_close_matches(tag.strip("'\"").strip().lower(), known, n=1)
        return f"did you mean '{known[near[0]]}'? " if near else ""

    def _report_other_tag_files(self) -> None:
        """Without tags.json, say so of files that look as if they held the tags."""
        if (self._root / "tags.json").is_file():
            return
        for path in sorted(self._root.iterdir()):
            stem, ending = path.stem.lower(), path.suffix.lower()
            endings = _TAG_FILES.get(stem, frozenset())
            if path.is_file() and (endings is None or ending in endings):
                text = 'is not read; if it holds the tags, write them as tags.json: {"NAME": [class names or ids]}'
                self.problems.append(Problem(path.name, text, "remark"))

    def _report_unknown(self, file: str, entries: list[str]) -> None:
        """Report entries of a JSON file that are for no image: those of unread files, and the rest."""
        found = {entry: self._unread.find(entry) or self._unread.find(self._image_name(entry)) for entry in entries}
        for text in self._unread.describe({entry: path for entry, path in found.items() if path is not None}):
            self._problem(file, text, blocking=False)
        super()._report_unknown(file, [entry for entry, path in found.items() if path is None])

    def _read_splits(self) -> dict[str, tuple[str, ...]]:
        splits: dict[str, tuple[str, ...]] = {}
        for path in sorted((self._root / "splits").glob("*.txt")):
            names = [self._image_name(line) for line in read_lines(path) if line]
            where = f"splits/{path.name}"
            unread = {
                name: file
                for name in names
                if name not in self._images and (file := self._unread.find(name)) is not None
            }
            for text in self._unread.describe(unread):
                self._problem(where, text)
            rest = [name for name in names if name not in unread]
            splits[path.stem] = self._split_names(rest, where) if rest or not unread else ()
        return splits or {"train": tuple(self._images)}

    def _image_name(self, entry: str) -> str:
        """The image that a line of a split means, by name or by file name in whatever folder."""
        # A name may hold dots of its own, so the plain name goes first; the file of a subfolder is another image.
        if entry in self._images or self._unread.is_nested(entry):
            return entry
        path = Path(entry)
        return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else entry


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
