"""What is missing to the twin: classes or borders? mIoU of models as they are, and with one kind of error taken away.

    python -m benchmarks.gap runs/voc-masks-0/model.pt runs/voc-scribbles-default-0/model.pt --data DATA

* as it is: the network alone, no refinement;
* classes known: a pixel's class is chosen among those of its image's mask, and the background where the set has one.
  Takes away every class that the image does not hold, as knowledge of the image's tags would;
* off borders: pixels closer than 1 % of the diagonal to a border of the mask do not count;
* both;
* objects: mean IoU of background and everything else as two classes: extents, whatever the class; where there is a
  background.

The truth of the split that is looked at enters all but the first and the last: these are explanations, not results.

    python -m benchmarks.gap --inner COPY --data DATA

makes a copy of a folder set whose training masks leave out the pixels that "off borders" leaves out: what a twin learns
that is never told where borders are.

    python -m benchmarks.gap --where COPY --labels runs/voc-scribbles-walk-0/pseudo_labels --data DATA
    python -m benchmarks.gap --mixed COPY --labels runs/voc-scribbles-walk-0/pseudo_labels --data DATA

take apart what labels that were carried on lack: training masks that are true, but only where a run's labels are; and
these labels, right or wrong, with the truth wherever they are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from training.data.dataset import has_background, open_dataset
from training.evaluate import Evaluator
from wsss_deploy import Segmenter
from wsss_deploy.card import IGNORE_INDEX

BAND = 0.01
VIEWS = ("as it is", "classes known", "off borders", "both", "objects")


def off_borders(truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The truth without its pixels near a change of class; unlabelled seams between two classes are such a change."""
    border = np.zeros(truth.shape, bool)
    border[1:] |= truth[1:] != truth[:-1]
    border[:, 1:] |= truth[:, 1:] != truth[:, :-1]
    if not border.any():
        return truth
    near = distance_transform_cdt(~border, metric="chessboard") <= BAND * np.hypot(*truth.shape)
    return np.where(near, IGNORE_INDEX, truth).astype(np.uint8)


def measure(model: Path, data: Path, split: str) -> dict[str, float]:
    """Mean IoU in [0, 1] by view, over the whole split."""
    source, segmenter = open_dataset(data), Segmenter(model, refine=False)
    classes, background = len(source.classes), has_background(source.classes)
    evaluators = {view: Evaluator(source.classes) for view in VIEWS[:4]}
    if background:
        evaluators[VIEWS[4]] = Evaluator(("background", "object"))
    for name in source.splits[split]:
        truth = source.load_labels(name, "masks")
        result = segmenter.predict(source.load_image(name))
        scores = result.scores.copy()
        held = np.setdiff1d(np.unique(truth), [IGNORE_INDEX])
        held = np.union1d(held, [0]) if background else held
        scores[np.setdiff1d(np.arange(classes), held)] = -1
        known = scores.argmax(0).astype(np.uint8)
        inner = off_borders(truth)
        extent = np.where(truth == IGNORE_INDEX, IGNORE_INDEX, truth > 0).astype(np.uint8)
        seen = (
            (result.mask, truth), (known, truth), (result.mask, inner), (known, inner),
            ((result.mask > 0).astype(np.uint8), extent),
        )  # fmt: skip
        for (predicted, mask), evaluator in zip(seen, evaluators.values(), strict=False):
            evaluator.update(predicted, mask)
    return {view: evaluator.result().miou for view, evaluator in evaluators.items()}


def write_copy(data: Path, copy: Path, change: Callable[[str, NDArray[np.uint8]], NDArray[np.uint8]]) -> str:
    """Copy a folder set by links, its training masks changed; how many of their pixels are labelled and right.

    Args:
        data: The set.
        copy: A new folder.
        change: From an image's name and mask to the mask that it gets.
    """
    source = open_dataset(data)
    train = set(source.splits["train"])
    (copy / "masks").mkdir(parents=True)
    for path in data.iterdir():
        if path.name != "masks":
            (copy / path.name).symlink_to(path.resolve())
    kept = right = labelled = 0
    for path in (data / "masks").iterdir():
        if path.stem not in train:
            (copy / "masks" / path.name).symlink_to(path.resolve())
            continue
        truth = source.load_labels(path.stem, "masks")
        changed = change(path.stem, truth)
        Image.fromarray(changed).save(copy / "masks" / path.name)
        known = truth != IGNORE_INDEX
        kept += int(np.count_nonzero(known & (changed != IGNORE_INDEX)))
        right += int(np.count_nonzero(known & (changed == truth)))
        labelled += int(np.count_nonzero(known))
    return (
        f"{kept / labelled:.1%} of the labelled pixels of the masks have a label, {right / kept:.1%} of these are right"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    copies = parser.add_mutually_exclusive_group()
    copies.add_argument("--inner", type=Path, metavar="COPY", help="write a copy without borders and measure nothing")
    copies.add_argument("--where", type=Path, metavar="COPY", help="write a copy with the truth where --labels are")
    copies.add_argument(
        "--mixed", type=Path, metavar="COPY", help="write a copy with --labels, and the truth elsewhere"
    )
    parser.add_argument("--labels", type=Path, help="folder of label maps NAME.png")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.where or options.mixed) and not options.labels:
        parser.error("--where and --mixed need --labels, the folder of a run's pseudo_labels")

    def labels(name: str) -> NDArray[np.uint8]:
        return np.asarray(Image.open(options.labels / f"{name}.png"), dtype=np.uint8)

    def where(name: str, truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.where(labels(name) == IGNORE_INDEX, IGNORE_INDEX, truth).astype(np.uint8)

    def mixed(name: str, truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        own = labels(name)
        # Where the truth is not known, neither is whether a label is right.
        return np.where((own == IGNORE_INDEX) | (truth == IGNORE_INDEX), truth, own).astype(np.uint8)

    for copy, change in (
        (options.inner, lambda _, truth: off_borders(truth)), (options.where, where), (options.mixed, mixed),
    ):  # fmt: skip
        if copy:
            print(write_copy(options.data, copy, change))
            return 0
    if not options.models:
        parser.error("give one model.pt or more, or --inner, --where or --mixed")
    rows = {model.parent.name: measure(model, options.data, options.split) for model in options.models}
    views = [view for view in VIEWS if view in next(iter(rows.values()))]
    print(f"| {options.data.name}, {options.split} | " + " | ".join(views) + " |")
    print("|" + "---|" * (len(views) + 1))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{100 * row[view]:.1f}" for view in views) + " |")
    settings: dict[str, list[dict[str, float]]] = {}
    for name, row in rows.items():
        settings.setdefault(name.rpartition("-")[0], []).append(row)
    for name, found in settings.items():
        if len(found) > 1:
            means = " | ".join(f"{100 * statistics.mean(row[view] for row in found):.1f}" for view in views)
            print(f"| mean of {len(found)}: {name} | {means} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
