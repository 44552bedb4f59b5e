"""A small valid data set, generated, which tests damage in one way each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_deploy.card import default_palette, palette_bytes

CLASSES = ("background", "disc", "bar")
NAMES = ("a", "b", "c", "d")


def write_labels(path: Path, labels: np.ndarray) -> None:
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette_bytes(default_palette(len(CLASSES))))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def scene(seed: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and its mask (H, W): a disc and a bar on noise."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    mask[(ys - 16) ** 2 + (xs - 16) ** 2 < 100] = 1
    mask[30:42, 30:60] = 2
    mask[0, :] = 255
    image = rng.integers(0, 60, (height, width, 3)) + np.array([0, 80, 160])[np.minimum(mask, 2)][:, :, None]
    return image.astype(np.uint8), mask


@pytest.fixture
def labels_writer():
    return write_labels


@pytest.fixture
def folder_set(tmp_path) -> Path:
    root = tmp_path / "shapes"
    (root / "images").mkdir(parents=True)
    (root / "splits").mkdir()
    for seed, name in enumerate(NAMES):
        image, mask = scene(seed)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        write_labels(root / "masks" / f"{name}.png", mask)
        scribbles = np.full(mask.shape, 255)
        scribbles[16, 8:24], scribbles[36, 34:56], scribbles[4, 30:60] = 1, 2, 0
        write_labels(root / "scribbles" / f"{name}.png", scribbles)
        points = np.full(mask.shape, 255)
        points[16, 16], points[36, 40], points[45, 5] = 1, 2, 0
        write_labels(root / "points" / f"{name}.png", points)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "tags.json").write_text(json.dumps({name: [1, 2] for name in NAMES}))
    (root / "splits" / "train.txt").write_text("a\nb\nc\n")
    (root / "splits" / "val.txt").write_text("d\n")
    return root
