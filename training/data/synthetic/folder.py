"""Synthetic scenes as a data set folder that keeps the data contract."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.data.synthetic.scene import CLASSES, draw_scene
from training.data.weak import simulate_scribbles
from wsss_deploy.card import palette_bytes
from wsss_deploy.errors import DataError
from wsss_deploy.files import atomic_write

# A quiet background; the objects' colours are bright and easy to tell apart.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (122, 130, 148),
    (240, 101, 67),
    (255, 202, 58),
    (67, 170, 139),
    (76, 132, 255),
    (178, 108, 232),
    (242, 132, 186),
)
SCRIBBLE_LENGTH = 1.0
_SPLITS = ("train", "val")


def write_scenes(
    root: str | os.PathLike[str],
    train: int = 300,
    val: int = 60,
    size: int = 128,
    seed: int = 0,
    on_scene: Callable[[], None] | None = None,
) -> Path:
    """Write a data set of synthetic scenes: images, exact masks, scribbles, classes, splits.

    Scene number n of a split depends on `seed`, the split and n alone, so that a smaller set is the beginning of a
    larger one.

    Args:
        root: Folder; must be absent or empty.
        train: Training scenes.
        val: Validation scenes.
        size: Side of the images, pixels.
        seed: Seed of everything.
        on_scene: Called after each scene, for progress.

    Returns:
        The folder.

    Raises:
        DataError: The folder is not empty, or cannot be written.
    """
    folder = Path(root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; choose another or delete it")
    for number, (split, count) in enumerate(zip(_SPLITS, (train, val), strict=True)):
        names = [f"{split}_{index:04d}" for index in range(count)]
        for index, name in enumerate(names):
            rng = np.random.default_rng([seed, number, index])
            image, mask = draw_scene(rng, size)
            _write_png(folder / "images" / f"{name}.png", image)
            _write_png(folder / "masks" / f"{name}.png", mask)
            scribbles = simulate_scribbles(mask, rng, length=SCRIBBLE_LENGTH, width=3)
            _write_png(folder / "scribbles" / f"{name}.png", scribbles)
            if on_scene is not None:
                on_scene()
        _write_lines(folder / "splits" / f"{split}.txt", names)
    # Last: without the list of classes nothing takes the folder for a data set.
    _write_lines(folder / "classes.txt", CLASSES)
    return folder


def _write_png(path: Path, array: npt.NDArray[np.uint8]) -> None:
    image = Image.fromarray(array)
    if array.ndim == 2:
        image.putpalette(palette_bytes(PALETTE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, compress_level=1)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose a writable folder") from error


def _write_lines(path: Path, lines: tuple[str, ...] | list[str]) -> None:
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
