"""How many images tags need: pseudo-labels by number of images, with and without objectness.

    python -m benchmarks.few_images --shared SHARED --out runs --sizes 60 120 250 500 --draws 3

Random parts of voc_animals' training images with their tags; nothing is trained but the default's first stage. Labels
of all these images are scored against their masks, which the stage does not read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.tags import linked_part
from training.cam.scoring import score_labels
from training.cam_stage import LABELS, add_pseudo_labels
from training.data.dataset import open_dataset
from training.run import resolve_recipe

# Whatever the number of images, "auto" then takes it.
SETTINGS = {"with objectness": {"few_images": 1_000_000}, "without": {"objectness": "off"}}


def part(whole: Path, out: Path, count: int, draw: int) -> Path:
    """The data set with so many training images, always the same."""
    names = sorted((whole / "splits" / "train.txt").read_text().split())
    chosen = np.random.default_rng(draw).permutation(len(names))[:count]
    return linked_part(whole, out / f"{whole.name}_{count}_{draw}", sorted(names[index] for index in chosen))


def measure(options: argparse.Namespace, count: int, draw: int, name: str) -> dict:
    """One first stage, or its kept scores."""
    folder = options.out / f"few-{count}-{draw}-{'off' if name == 'without' else 'auto'}"
    record = folder / "scores.json"
    if not record.is_file():
        source = open_dataset(part(options.shared / "data" / "voc_animals", options.out, count, draw))
        weights = options.shared / "weights" / "vit_tiny_patch16_224.safetensors"
        given = {
            "seed": draw,
            "model": {"weights": str(weights)},
            "augmentation": {"size": 256},
            "method": {"name": "tags", "cams": {"kind": "tokens", **SETTINGS[name]}},
        }
        add_pseudo_labels(resolve_recipe(source, "tags", [given]), source, folder, False)
        found = [kind for image in source.splits["train"] for kind in source.tags(image) or ()]
        scores = score_labels(source, folder / LABELS, list(source.splits["train"]))
        scores["images_per_class"] = float(np.median(np.bincount(found)[1:]))
        record.write_text(json.dumps(scores))
    return json.loads(record.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("WSSS_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[60, 120, 250, 500])
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    print(f"| images (a class) | {' | '.join(f'{name}, by draw | mean' for name in SETTINGS)} |")
    print("|---|" + "---|---|" * len(SETTINGS), flush=True)
    for count in options.sizes:
        cells = []
        for name in SETTINGS:
            rows = [measure(options, count, draw, name) for draw in range(options.draws)]
            values = [100 * row["miou"] for row in rows]
            cells += [", ".join(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}"]
            each = statistics.median(row["images_per_class"] for row in rows)
        print(f"| {count} ({each:.0f}) | {' | '.join(cells)} |", flush=True)
    print(
        "\nProtocol: voc_animals, random parts of its training images, image tags alone; ViT-Tiny with supervised "
        "ImageNet weights; mIoU of pseudo-labels where they are sure, all images of the part, no tags of others; first "
        f"stage alone; draw = seed. torch {torch.__version__}, {date.today()}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
