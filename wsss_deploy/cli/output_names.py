"""Names of result files: one for each image, and never a file of the user's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from wsss_deploy.segmentation import SOFTWARE

#: Bytes; leaves room for "_overlay.png" within the 255 of common file systems.
_LONGEST = 200


def output_names(images: Sequence[Path]) -> list[str]:
    """A different name for every image, also where upper and lower case are the same.

    The image's name without suffix if no other image has it; else with its suffix (`a_jpg`, `a_png`); else with its
    folder before it (`left_a`, `right_a`); else numbered.

    Args:
        images: The images.

    Returns:
        Names in the same order.
    """
    forms: list[Callable[[Path], str]] = [
        lambda path: path.stem,
        lambda path: f"{path.stem}_{path.suffix[1:]}",
        lambda path: f"{path.absolute().parent.name}_{path.stem}",
        lambda path: f"{path.absolute().parent.name}_{path.stem}_{path.suffix[1:]}",
    ]
    names: dict[int, str] = {}
    used: set[str] = set()
    remaining = list(range(len(images)))
    for form in forms:
        proposed = {index: _shorten(form(images[index])) for index in remaining}
        counts = Counter(name.casefold() for name in proposed.values())
        for index, name in proposed.items():
            if counts[name.casefold()] == 1 and name.casefold() not in used:
                names[index] = name
                used.add(name.casefold())
        remaining = [index for index in remaining if index not in names]
    for index in remaining:
        stem, number = _shorten(forms[-1](images[index])), 2
        while f"{stem}-{number}".casefold() in used:
            number += 1
        names[index] = f"{stem}-{number}"
        used.add(names[index].casefold())
    return [names[index] for index in range(len(images))]


def replaceable(path: Path) -> bool:
    """Whether an existing file is a result of wsss-predict, which a new run may replace."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            return isinstance(content, dict) and content.get("format") == "wsss-predict"
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _shorten(name: str) -> str:
    return name.encode()[:_LONGEST].decode(errors="ignore")
