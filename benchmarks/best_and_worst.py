"""A picture of the images that a model segments best and worst: image, weak label, prediction, ground truth.

    python benchmarks/best_and_worst.py runs/voc-points-gated-0/model.pt DATA --kind points --out sheet.png

Images are ranked by their own mIoU: the mean over the classes that the mask or the prediction holds, at native size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.contact_sheet import SheetRow, contact_sheet
from training.data.dataset import PIXEL_KINDS, DataSource, open_dataset
from training.data.simulated import SimulatedSource
from training.data.transforms import grow_points
from wsss_deploy import Segmenter
from wsss_deploy.card import IGNORE_INDEX


def image_miou(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Mean IoU of the classes that occur in either map; pixels without truth are left out."""
    known = truth != IGNORE_INDEX
    prediction, truth = prediction[known], truth[known]
    classes = np.union1d(prediction, truth)
    hits = []
    for index in classes:
        ours, theirs = prediction == index, truth == index
        hits.append(np.count_nonzero(ours & theirs) / np.count_nonzero(ours | theirs))
    return float(np.mean(hits)) if hits else float("nan")


def weak_label(source: DataSource, name: str, kind: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The label of a kind, simulated from the mask where the set has none of it."""
    if kind == "masks":
        return np.full(shape, IGNORE_INDEX, np.uint8)
    if kind not in source.kinds(name):
        source = SimulatedSource(source, kind, seed=0)
    labels = source.load_labels(name, kind)
    # A point of one pixel would not be seen.
    return grow_points(labels, max(2, max(shape) // 60), np.ones(shape, bool)) if kind == "points" else labels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kind", choices=PIXEL_KINDS, default="points", help="weak label to show")
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, default=5, help="images of each end")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when the median image is below 0.5")
    options = parser.parse_args()

    source, segmenter = open_dataset(options.data), Segmenter(options.model)
    scores: dict[str, float] = {}
    for name in source.splits[options.split]:
        prediction = segmenter.predict(source.load_image(name)).mask
        scores[name] = image_miou(prediction, source.load_labels(name, "masks"))
    ranked = sorted((name for name in scores if np.isfinite(scores[name])), key=scores.__getitem__, reverse=True)
    chosen = ranked[: options.count] + ranked[-options.count :]
    rows = []
    for name in chosen:
        image = source.load_image(name)
        weak = weak_label(source, name, options.kind, image.shape[:2])
        rows.append(SheetRow(image, weak, segmenter.predict(image).mask, source.load_labels(name, "masks")))
    median = float(np.median([scores[name] for name in ranked]))
    caption = f"{len(ranked)} images of {source.name} {options.split}; image mIoU: " + ", ".join(
        f"{scores[name]:.2f}" for name in chosen
    )
    title = f"{options.model.parent.name}: the {options.count} best and the {options.count} worst images"
    contact_sheet(rows, source.classes, source.palette, title, caption).save(options.out)
    for name in chosen:
        print(f"{scores[name]:.4f} {name}")
    print(f"median {median:.4f}")
    if options.json:
        options.json.write_text(json.dumps({"median": median, "images": scores}, indent=1) + "\n")
    if options.check and median < 0.5:
        print(f"MISSED: the median image has mIoU {median:.4f}, goal 0.5")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
