from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = 48


def write_set(root: Path, images: int = 12, kinds: tuple[str, ...] = ("masks", "scribbles")) -> Path:
    """Bright squares (class 1) on dark noise (class 0), in the data contract's layout."""
    rng = np.random.default_rng(7)
    for folder in ("images", "splits", *kinds):
        (root / folder).mkdir(parents=True)
    names = [f"scene{index:02d}" for index in range(images)]
    for name in names:
        mask = np.zeros((SIZE, SIZE), np.uint8)
        y, x = rng.integers(2, SIZE - 24, 2)
        mask[y : y + 20, x : x + 20] = 1
        image = rng.integers(0, 60, (SIZE, SIZE, 3)) + 150 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{name}.png")
        if "masks" in kinds:
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        if "scribbles" in kinds:
            scribble = np.full((SIZE, SIZE), 255, np.uint8)
            scribble[y + 10, x + 3 : x + 17] = 1
            scribble[1, 2 : SIZE - 2] = 0
            Image.fromarray(scribble).save(root / "scribbles" / f"{name}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    (root / "splits" / "train.txt").write_text("\n".join(names[:-4]) + "\n")
    (root / "splits" / "val.txt").write_text("\n".join(names[-4:]) + "\n")
    return root


@pytest.fixture(scope="session")
def make_set():
    return write_set


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def small() -> dict:
    """Recipe values of a run that takes a second or two."""
    return {
        "model": {"encoder": "test_vit", "weights": "none", "decoder_width": 16},
        "augmentation": {"size": 48},
        "optimisation": {"iterations": 6, "batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"every": 3},
        "precision": "fp32",
        "device": "cpu",
    }
