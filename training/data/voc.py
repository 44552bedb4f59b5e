"""Reader of the PASCAL VOC devkit layout, with ScribbleSup's scribbles and points of What's the Point.

    JPEGImages/NAME.jpg                     required (here, or in VOC2012/ or VOCdevkit/VOC2012/ below)
    SegmentationClass/NAME.png              masks; where one is missing, SegmentationClassAug/NAME.png
    ImageSets/Segmentation/SPLIT.txt        names, or lines that begin with an image's path
    Annotations/NAME.xml                    boxes; their class names are the image's tags
    scribbles/NAME.xml                      ScribbleSup polylines (or ScribbleAnnotation/, or a pascal_2012/ in either),
                                            drawn 3 pixels wide; PNGs of class ids are read too
    points/NAME.png                         PNGs of class ids; without that file: points.json, as of What's the Point,
                                            {name: [{"x": px, "y": px, "cls": id or class name}]}
    classes.txt                             optional; otherwise the background and VOC's 20 classes

Scribbles: Lin et al., "ScribbleSup: Scribble-Supervised Convolutional Networks for Semantic Segmentation", CVPR 2016.
Points: Bearman et al., "What's the Point: Semantic Segmentation with Point Supervision", ECCV 2016.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, TreeBuilder
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import Problem, counted, has_background
from training.data.files import FileSource
from training.data.folder import read_classes
from training.data.rasterise import draw_polyline
from training.data.reading import IMAGE_SUFFIXES, files_by_stem, image_size, read_lines, size_fault
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# The names that ScribbleSup uses instead.
SHORT_NAMES = {
    "plane": "aeroplane", "bike": "bicycle", "table": "diningtable", "mbike": "motorbike", "motorcycle": "motorbike",
    "plant": "pottedplant", "monitor": "tvmonitor", "tv": "tvmonitor",
}  # fmt: skip

_SCRIBBLE_FOLDERS = ("scribbles", "scribbles/pascal_2012", "ScribbleAnnotation", "ScribbleAnnotation/pascal_2012")
_SCRIBBLE_WIDTH = 3


class VocSource(FileSource):
    """A data set in the VOC devkit layout.

    Args:
        root: The folder that holds JPEGImages, or one or two levels above it.

    Raises:
        DataError: There is no such folder, or more than one; lesser faults go to `problems`.
    """

    def __init__(self, root: Path) -> None:
        base = _find_base(root)
        classes = read_classes(base / "classes.txt") if (base / "classes.txt").is_file() else VOC_CLASSES
        images = files_by_stem(base / "JPEGImages", IMAGE_SUFFIXES)
        if not images:
            raise DataError(f"{base / 'JPEGImages'}: no images; expected *.jpg")
        super().__init__(base, classes, {name: paths[0] for name, paths in images.items()})
        self._labels["masks"] = self._label_files("SegmentationClassAug") | self._label_files("SegmentationClass")
        folder = next((name for name in reversed(_SCRIBBLE_FOLDERS) if (base / name).is_dir()), "scribbles")
        self._report_strays(folder, [".png", ".xml"])
        self._labels["scribbles"] = self._xml_files(folder) | self._label_files(folder)
        self._labels["points"] = self._label_files("points")
        self._report_strays("points", [".png"])
        self._points = self._read_points()
        self._boxes = self._xml_files("Annotations")
        self.splits = self._read_splits()

    def kinds(self, name: str) -> frozenset[str]:
        """Which kinds of labels the image has."""
        kinds = super().kinds(name)
        return kinds | {"tags"} if name in self._boxes else kinds

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels uint8 (H, W)."""
        path = self._labels.get(kind, {}).get(name)
        if path is not None and path.suffix.lower() == ".xml":
            return self._draw_scribbles(path, image_size(self.image_path(name)))
        return super().load_labels(name, kind)

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Ids of the classes that have a box in the image."""
        if name not in self._boxes:
            return None
        if name not in self._tags:
            path = self._boxes[name]
            names = [item.findtext("name", "").strip() for item in parse_xml(path).iter("object")]
            left_out = {0} if has_background(self.classes) else set[int]()
            self._tags[name] = tuple(sorted({self._named_class(label, path) for label in names} - left_out))
        return self._tags[name]

    def _draw_scribbles(self, path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
        labels = np.full(size, IGNORE_INDEX, np.uint8)
        root = parse_xml(path)
        given = (root.findtext("size/height"), root.findtext("size/width"))
        if all(given):
            found = (int(_number(given[0], path)), int(_number(given[1], path)))
            if found != size:
                raise DataError(f"{path}: {size_fault(found, size)}")
        for line in root.iter("polygon"):
            index = self._named_class(line.findtext("tag", "").strip(), path)
            points = [(_number(p.findtext("X"), path), _number(p.findtext("Y"), path)) for p in line.iter("point")]
            if points:
                labels[draw_polyline(size, points, _SCRIBBLE_WIDTH)] = index
        return labels

    def _class_id(self, value: object) -> int | None:
        # A class of the set's own that is called like a short name goes first.
        found = super()._class_id(value)
        return super()._class_id(SHORT_NAMES.get(value)) if found is None and isinstance(value, str) else found

    def _named_class(self, label: str, path: Path) -> int:
        index = self._class_id(label)
        if index is None:
            raise DataError(f"{path}: unknown class '{label}'; expected one of {', '.join(self.classes)}")
        return index

    def _xml_files(self, folder: str) -> dict[str, Path]:
        found = files_by_stem(self._root / folder, frozenset({".xml"}))
        orphans = [name for name in found if name not in self._images]
        if orphans:
            text = f"{counted(len(orphans), 'file')} without an image (first: {orphans[0]}.xml); add the image"
            self._problem(f"{folder}/", text, blocking=False)
        return {name: paths[0] for name, paths in found.items() if name in self._images}

    def _read_splits(self) -> dict[str, tuple[str, ...]]:
        splits: dict[str, tuple[str, ...]] = {}
        for path in sorted((self._root / "ImageSets" / "Segmentation").glob("*.txt")):
            names = [self._split_name(line) for line in read_lines(path) if line]
            splits[path.stem] = self._split_names(names, f"ImageSets/Segmentation/{path.name}")
        if not splits:
            text = "is missing or empty; all images make up the split 'train'"
            self.problems.append(Problem("ImageSets/Segmentation", text, "remark"))
        return splits or {"train": tuple(self._images)}

    def _split_name(self, line: str) -> str:
        # The lists of the augmented set have lines like "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png".
        return line if line in self._images else Path(line.split()[0]).stem


def _find_base(root: Path) -> Path:
    for pattern in ("JPEGImages", "*/JPEGImages", "*/*/JPEGImages"):
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.parent.relative_to(root)) for path in found)
            raise DataError(f"{root}: holds several VOC sets ({names}); give one of them")
        if found:
            return found[0].parent
    raise DataError(f"{root}: no folder JPEGImages; expected the VOC devkit layout (see docs/data.md)")


def parse_xml(path: Path) -> Element:
    """The root of an XML file without a document type: entities, which only a DOCTYPE can declare, are refused.

    Raises:
        DataError: The file cannot be read, is no XML, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise DataError(f"{path}: declares a DOCTYPE, which annotation files have no use for; remove it")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
        root: Element = builder.close()
    except (OSError, expat.ExpatError, ParseError) as error:
        raise DataError(f"{path}: is not readable XML ({error}); restore the file") from error
    return root


def _number(text: str | None, path: Path) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or abs(value) > 1e6:
        raise DataError(f"{path}: found '{text}', expected a coordinate in pixels")
    return value
