"""Labels that are carried on before a training: how many pixels get one, and how many of these are right.

    python -m benchmarks.carried_labels --shared SHARED --out runs --kind scribbles --images 200

Random training images of voc_animals with their scribbles (simulated) or points; `method.propagate` of these images
alone, without and with its random walk, at several thresholds. Labels are scored against the masks, which the stage
does not read; what was given counts too.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.few_images import part
from training.data.dataset import open_dataset
from training.data.pipeline import TrainingSet
from training.evaluate import Evaluator
from training.methods.tag_settings import WalkSettings
from training.propagation_stage import add_propagated_labels
from training.run import prepare_source, resolve_recipe
from wsss_deploy.card import IGNORE_INDEX

SURE = [0.6, 0.7, 0.8]


def measure(options: argparse.Namespace, walk: dict | None, sure: float) -> str:
    """One table cell."""
    plain = open_dataset(part(options.shared / "data" / "voc_animals", options.out, options.images, 0))
    weights = options.shared / "weights" / "vit_tiny_patch16_224.safetensors"
    propagate = {
        "walk": walk,
        "labels": {"sure": sure},
        "tokens": {"images": options.kind == "points"},
        "long_side": options.long_side,
    }
    given = {
        "model": {"weights": str(weights)},
        "augmentation": {"size": 256},
        "method": {"name": "partial_ce", "propagate": propagate},
    }
    recipe = resolve_recipe(plain, options.kind, [given])
    source, _ = prepare_source(plain, recipe)
    names = source.splits["train"]
    dataset = TrainingSet(source, names, (options.kind,), recipe.augmentation, recipe.seed)
    folder = options.out / f"carried-{options.kind}-{options.images}-{options.long_side}"
    folder.mkdir(parents=True, exist_ok=True)
    carried = add_propagated_labels(recipe, recipe.method.propagate, source, dataset, folder, False)
    if carried is None:
        return "not carried on"
    evaluator, counts = Evaluator(source.classes), np.zeros(3)
    for name in names:
        found, truth = carried.load_labels(name, "masks"), source.load_labels(name, "masks")
        true, known = truth != IGNORE_INDEX, found != IGNORE_INDEX
        evaluator.update(np.where(known, found, 0).astype(np.uint8), np.where(known, truth, IGNORE_INDEX))
        counts += true.sum(), (true & known).sum(), (true & (found == truth)).sum()
    labelled, right = counts[1] / counts[0], counts[2] / counts[1]
    return f"{labelled:.1%}, {right:.1%} right, {100 * evaluator.result().miou:.1f} mIoU where labelled"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("WSSS_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--kind", choices=("scribbles", "points"), default="scribbles")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sure", nargs="*", type=float, default=SURE, help="least probabilities of a label")
    parser.add_argument("--long-side", type=int, default=384, help="pixels at which images are read")
    parser.add_argument("--restart", type=float, default=WalkSettings().restart, help="of the walk")
    options = parser.parse_args()
    print(f"| {options.kind}: pixels with a label | {' | '.join(f'sure {sure}' for sure in options.sure)} |")
    print("|---|" + "---|" * len(options.sure), flush=True)
    for title, walk in (("classifier alone", None), ("with the walk", {"restart": options.restart})):
        print(f"| {title} | {' | '.join(measure(options, walk, sure) for sure in options.sure)} |", flush=True)
    print(
        f"\nProtocol: voc_animals, {options.images} random training images and their {options.kind}, ViT-Tiny with "
        f"supervised ImageNet weights; images read at {options.long_side} px, restart {options.restart}; labels "
        f"carried on, no training. torch {torch.__version__}, {date.today()}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
