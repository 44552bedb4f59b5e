"""Reading files of a data set: images upright, label maps by value, JSON and text lists; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_deploy import images
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError, ImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as RGB uint8 (H, W, 3), upright.

    Raises:
        DataError: It cannot be read; the message names the file and the remedy.
    """
    try:
        return images.load_image(path)
    except ImageError as error:
        raise DataError(str(error)) from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright image, from the file's header only.

    Raises:
        DataError: The file is no image.
    """
    try:
        return images.image_size(path)
    except ImageError as error:
        raise DataError(str(error)) from error


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """A label map whose pixel values are class ids; a palette is only for looking at and is not applied.

    Args:
        path: A palette, grey or 16-bit grey PNG.

    Returns:
        uint8 (H, W); the ids are for `check_labels` to judge.

    Raises:
        DataError: The file cannot be read, has colours instead of ids, or holds a value above 255.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            values: NDArray[Any] = np.array(image)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; restore it or take it off the data set") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise DataError(f"{path}: is damaged or cut short ({error}); save it again as a PNG of class ids") from error
    if mode not in ("P", "L", "1", "I") and not mode.startswith("I;16"):
        raise DataError(
            f"{path}: has colours (mode {mode}), expected one channel whose values are class ids; "
            "save it as a palette or grey PNG"
        )
    if values.dtype != np.uint8:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > IGNORE_INDEX:
            raise DataError(f"{path}: holds values from {low} to {high}, expected class ids or {IGNORE_INDEX}")
        values = values.astype(np.uint8)
    return values


def check_labels(labels: NDArray[np.uint8], where: str, size: tuple[int, int], classes: int) -> NDArray[np.uint8]:
    """Return `labels` when they fit the image and the classes.

    Args:
        labels: (H, W).
        where: Their file, for the error.
        size: (height, width) of the upright image.
        classes: Number of classes K.

    Raises:
        DataError: The size differs or an id is neither below K nor 255; both are told.
    """
    faults = []
    if labels.shape != size:
        faults.append(size_fault((labels.shape[0], labels.shape[1]), size))
    bad = (labels >= classes) & (labels != IGNORE_INDEX)
    if bad.any():
        found = ", ".join(str(value) for value in np.unique(labels[bad])[:5])
        remedy = "correct the ids or add the classes"
        faults.append(f"holds class id {found}, expected 0..{classes - 1} or {IGNORE_INDEX}; {remedy}")
    if faults:
        raise DataError(f"{where}: {'; '.join(faults)}")
    return labels


def size_fault(found: tuple[int, int], size: tuple[int, int]) -> str:
    """What is wrong with labels of size `found` for an upright image of `size`, both (height, width)."""
    turned = " (turned by 90 degrees: the image has an EXIF orientation)" if found == size[::-1] else ""
    return (
        f"is {found[1]}x{found[0]}, its image {size[1]}x{size[0]} (width x height){turned}; "
        "labels must have the size of the upright image"
    )


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without surrounding blanks; empty lines at the end are dropped.

    Raises:
        DataError: It cannot be read as UTF-8 text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); write one name a line") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: It cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not readable JSON ({error}); write it again") from error


def files_by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    """Files of a folder with one of `suffixes` (lower case), by name without ending, sorted; {} without the folder."""
    found: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                found.setdefault(path.stem, []).append(path)
    return found
