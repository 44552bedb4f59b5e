"""Which files a command means by IMAGE, FOLDER and GLOB."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from PIL import Image

from wsss_deploy.card import default_palette
from wsss_deploy.errors import ImageError


def find_images(patterns: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expand images, folders and glob patterns.

    A path that is no folder is taken as it is, also if no such file exists, so that reading it gives the error.
    A folder gives the images directly inside it, sorted; a pattern (`*`, `?`, `[...]`, and `**` for all depths) those
    that match: files whose suffix belongs to an image format, without hidden ones.

    Args:
        patterns: What the user gave.

    Returns:
        The files in that order, each once.

    Raises:
        ImageError: A folder or pattern gives no image.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        files = _expand(os.fspath(pattern))
        if not files:
            raise ImageError(
                f"{os.fspath(pattern)}: holds or matches no image; "
                "pass an image file, a folder of images or a quoted pattern"
            )
        for file in files:
            found.setdefault(Path(os.path.abspath(file)), file)
    return list(found.values())


def image_name(entry: str, known: Collection[str]) -> str:
    """The image that an entry of a list of labels means: by its name, its file's name, or that below images/.

    Args:
        entry: As somebody wrote it.
        known: Names of the images. A name may hold dots of its own, so they go before any ending.

    Returns:
        A name, of `known` or not. An entry of another folder stays as it is: its image may be another one.
    """
    path = Path(entry)
    if entry in known or path.parent.as_posix() not in (".", "images"):
        return entry
    is_file = path.name not in known and path.suffix.lower() in Image.registered_extensions()
    return path.stem if is_file else path.name


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(_images(path.iterdir()))
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    return sorted(_images(Path(match) for match in glob.iglob(pattern, recursive=True)))


def _images(paths: Iterable[Path]) -> Iterable[Path]:
    suffixes = Image.registered_extensions()
    return (
        path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def read_palette(paths: Sequence[Path], classes: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of the first file that has a usable palette, else the VOC colour map.

    A palette is usable when it tells the classes apart and is not the grey ramp that some programs add.

    Args:
        paths: Candidates; only the first few are opened.
        classes: Number of classes K.
    """
    default = default_palette(classes)
    for path in paths[:3]:
        try:
            with Image.open(path) as image:
                flat = image.getpalette("RGB") if image.mode == "P" else None
        except Exception:  # damaged files are reported where their labels are read
            flat = None
        if not flat:
            continue
        found = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, min(len(flat), 3 * classes) - 2, 3)]
        colors = (*found, *default[len(found) :])
        ramp = all(color == (index, index, index) for index, color in enumerate(colors))
        if len(set(colors)) == classes and not ramp:
            return colors
    return default
