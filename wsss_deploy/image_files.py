"""Which files a command means by IMAGE, FOLDER and GLOB."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

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
