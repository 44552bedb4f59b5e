"""Reader of COCO's instance and panoptic JSON.

    annotations/instances_SPLIT.json        (or SPLIT/_annotations.coco.json, images beside it)
    annotations/panoptic_SPLIT.json         with annotations/panoptic_SPLIT/*.png or panoptic_SPLIT/*.png
    SPLIT/, images/SPLIT/, images/ or ./    image files, under the `file_name` that the JSON gives

SPLIT is called without a year: instances_train2017.json is the split "train". With instances, class 0 is the
background and the categories follow in the order of their ids; smaller objects lie over larger ones. With panoptic
files, the categories in that order are the classes, from 0, and what has no segment is unlabelled. Where both are
there, the instances are read. Tags are the categories that occur. Format: Lin et al., "Microsoft COCO", ECCV 2014.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.dataset import Problem, counted
from training.data.files import FileSource
from training.data.rasterise import decode_rle, fill_polygon
from training.data.reading import check_labels, image_size, read_json, size_fault
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError

_YEAR = re.compile(r"(?<=\D)\d{4}$")


@dataclass(frozen=True)
class _Record:
    """One image's annotations.

    Attributes:
        file: The JSON file that they come from.
        annotations: As they stand there.
        segments: The panoptic PNG, None for instances.
        size: Height and width that the JSON gives; None where it gives none.
    """

    file: Path
    annotations: Sequence[Mapping[str, Any]]
    segments: Path | None
    size: tuple[int, int] | None


class CocoSource(FileSource):
    """A data set from COCO JSON files.

    Args:
        root: The folder.

    Raises:
        DataError: No JSON file is found or one is not of the format; lesser faults go to `problems`.
    """

    def __init__(self, root: Path) -> None:
        files, panoptic = _find_files(root)
        self._categories: dict[int, int] = {}
        names: list[str] = []
        images: dict[str, Path] = {}
        self._records: dict[str, _Record] = {}
        found: list[Problem] = []
        splits: dict[str, tuple[str, ...]] = {}
        for path in files:
            content = _read(path)
            listed = sorted((int(item["id"]), str(item["name"])) for item in content["categories"])
            if not names:
                names = [name for _, name in listed]
                self._categories = {number: index + (not panoptic) for index, (number, _) in enumerate(listed)}
            elif [name for _, name in listed] != names or {number for number, _ in listed} != set(self._categories):
                raise DataError(f"{path}: its categories differ from those of {files[0].name}; expected the same")
            if len(set(names)) != len(names):
                raise DataError(f"{path}: category names occur twice; expected unique names")
            split = _split_of(path)
            splits[split] = self._read_split(root, path, split, content, images, panoptic, found)
        classes = tuple(names) if panoptic else ("background", *names)
        if not 2 <= len(classes) <= 255:
            raise DataError(f"{files[0]}: {len(classes)} classes, expected 2 to 255")
        super().__init__(root, classes, images)
        self.problems.extend(found)
        self.splits = splits

    def kinds(self, name: str) -> frozenset[str]:
        """Masks and tags; no masks where an object has a box only."""
        if name not in self._records:
            return frozenset()
        record = self._records[name]
        whole = record.segments is not None or all(item.get("segmentation") for item in record.annotations)
        return frozenset({"masks", "tags"} if whole else {"tags"})

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels uint8 (H, W)."""
        if kind != "masks" or "masks" not in self.kinds(name):
            return super().load_labels(name, kind)
        record, size = self._records[name], image_size(self.image_path(name))
        if record.size is not None and record.size != size:
            # Outlines are in pixels of the size that the annotator saw.
            raise DataError(
                f"{record.file}: {self.image_path(name).name} is {record.size[1]} x {record.size[0]} there, the file "
                f"{size[1]} x {size[0]}; restore the images that were annotated"
            )
        if record.segments is not None:
            return self._draw_panoptic(record, record.segments, size)
        labels = np.zeros(size, np.uint8)
        regions = [(self._class_of(item, record), self._region(item, record, size)) for item in record.annotations]
        # Small over large: a ball in front of a player stays visible whatever the order in the file.
        for index, region in sorted(regions, key=lambda pair: -int(pair[1].sum())):
            labels[region] = index
        return labels

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Ids of the categories in the image."""
        record = self._records.get(name)
        if record is None:
            return None
        return tuple(sorted({self._class_of(item, record) for item in record.annotations}))

    def _read_split(
        self,
        root: Path,
        path: Path,
        split: str,
        content: Mapping[str, Any],
        images: dict[str, Path],
        panoptic: bool,
        found: list[Problem],
    ) -> tuple[str, ...]:
        folders = _image_folders(root, path, split)
        segments = _segment_folder(root, path) if panoptic else None
        annotations: dict[Any, list[Mapping[str, Any]]] = {}
        pngs: dict[Any, str] = {}
        for item in content["annotations"]:
            annotations.setdefault(item["image_id"], []).extend(item["segments_info"] if panoptic else [item])
            if panoptic:
                pngs[item["image_id"]] = item["file_name"]
        names: list[str] = []
        missing: list[str] = []
        for item in content["images"]:
            file = str(item["file_name"])
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise DataError(f"{path}: the image '{file}' lies outside of the data set; expected a name inside it")
            image = next((folder / file for folder in folders if (folder / file).is_file()), None)
            if image is None:
                missing.append(file)
                continue
            name = image.stem
            if name in images and images[name] != image:
                found.append(Problem(str(path.name), f"two images are named '{name}'; rename one", blocking=True))
                continue
            images[name] = image
            names.append(name)
            if not panoptic or item["id"] in pngs:
                png = segments / pngs[item["id"]] if segments is not None else None
                self._records[name] = _Record(path, annotations.get(item["id"], []), png, _declared_size(item))
        strays = sorted(map(str, annotations.keys() - {item["id"] for item in content["images"]}))
        if strays:
            text = f"annotations of {counted(len(strays), 'image')} not in the list 'images' (first: id {strays[0]})"
            found.append(Problem(path.name, f"{text}; they are left out", severity="remark"))
        if missing:
            text = f"{counted(len(missing), 'image')} not found (first: {missing[0]}); expected in {split}/ or images/"
            found.append(Problem(path.name, text, blocking=True))
        return tuple(names)

    def _class_of(self, item: Mapping[str, Any], record: _Record) -> int:
        number = item.get("category_id")
        if number not in self._categories:
            raise DataError(f"{record.file}: annotation {item.get('id')} has the unknown category {number}")
        return self._categories[number]

    def _region(self, item: Mapping[str, Any], record: _Record, size: tuple[int, int]) -> NDArray[np.bool_]:
        shape = item["segmentation"]
        try:
            if isinstance(shape, Mapping):
                found = (int(shape["size"][0]), int(shape["size"][1]))
                if found != size:
                    raise DataError(f"{record.file}: annotation {item.get('id')} {size_fault(found, size)}")
                return decode_rle(shape["counts"], size)
            region = np.zeros(size, bool)
            for polygon in shape:
                region |= fill_polygon(size, polygon)
            return region
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{record.file}: annotation {item.get('id')}: unusable segmentation ({error})") from error

    def _draw_panoptic(self, record: _Record, path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                colours = np.array(image.convert("RGB")).astype(np.int64)
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            raise DataError(f"{path}: cannot be read as a panoptic PNG ({error}); restore it") from error
        numbers = colours @ np.array([1, 256, 65536])
        table = {int(item["id"]): self._class_of(item, record) for item in record.annotations}
        present, inverse = np.unique(numbers, return_inverse=True)
        unknown = [int(number) for number in present if number and int(number) not in table]
        if unknown:
            raise DataError(f"{path}: segment {unknown[0]} is not in {record.file.name}; restore the pair of files")
        ids = np.array([table.get(int(number), IGNORE_INDEX) for number in present], np.uint8)
        return check_labels(ids[inverse].reshape(numbers.shape), str(path), size, len(self.classes))


def _find_files(root: Path) -> tuple[list[Path], bool]:
    """The JSON files to read and whether they are panoptic."""
    instances = sorted(root.glob("annotations/instances_*.json")) or sorted(root.glob("*/_annotations.coco.json"))
    panoptic = sorted(root.glob("annotations/panoptic_*.json"))
    if instances or panoptic:
        return instances or panoptic, not instances
    raise DataError(
        f"{root}: no COCO annotations; expected annotations/instances_SPLIT.json, annotations/panoptic_SPLIT.json "
        "or SPLIT/_annotations.coco.json"
    )


def _split_of(path: Path) -> str:
    if path.name == "_annotations.coco.json":
        return {"valid": "val"}.get(path.parent.name, path.parent.name)
    return _YEAR.sub("", path.stem.split("_", 1)[1])


def _image_folders(root: Path, path: Path, split: str) -> list[Path]:
    if path.name == "_annotations.coco.json":
        return [path.parent]
    label = path.stem.split("_", 1)[1]
    return [root / label, root / "images" / label, root / split, root / "images" / split, root / "images", root]


def _declared_size(item: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = item.get("height"), item.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _segment_folder(root: Path, path: Path) -> Path:
    folders = [path.with_suffix(""), root / path.stem, path.parent, root]
    return next((folder for folder in folders if folder.is_dir()), path.parent)


def _read(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    needed = ("images", "annotations", "categories")
    absent = [key for key in needed if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if absent:
        raise DataError(f"{path}: is no COCO file: '{absent[0]}' is missing or no list")
    keys = {"images": ("id", "file_name"), "annotations": ("image_id",), "categories": ("id", "name")}
    for part, wanted in keys.items():
        for item in content[part]:
            lacking = [key for key in wanted if not isinstance(item, dict) or key not in item]
            if lacking:
                raise DataError(f"{path}: an entry of '{part}' has no '{lacking[0]}'")
    result: Mapping[str, Any] = content
    return result
