"""Where sparse labels are wrong: near ends of strokes and elsewhere, class by class, as they are and in crops.

    python -m benchmarks.label_errors --shared SHARED

Nothing is trained. Labels of the training images (real scribbles where there are some, else simulated ones) are
compared with the masks of the same images, which no training from sparse labels reads. A labelled pixel is near an
end where the circle around it meets labels of its class on one side at most; a pen's course meets it on two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataSource, open_dataset
from training.data.pipeline import Augmentation, TrainingSet
from training.data.simulated import SimulatedSource
from wsss_deploy.card import IGNORE_INDEX

SETS = ("voc_animals", "camvid", "acdc_scribbles")
_ANGLES = 48


def near_ends(labels: NDArray[np.uint8], radius: float) -> NDArray[np.bool_]:
    """Labelled pixels (H, W) whose circle of this radius lies partly in their own label, in one run at most."""
    ys, xs = np.nonzero(labels != IGNORE_INDEX)
    angles = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    rows = np.rint(ys[:, None] + radius * np.sin(angles)).astype(int)
    columns = np.rint(xs[:, None] + radius * np.cos(angles)).astype(int)
    inside = (rows >= 0) & (rows < labels.shape[0]) & (columns >= 0) & (columns < labels.shape[1])
    met = labels[rows.clip(0, labels.shape[0] - 1), columns.clip(0, labels.shape[1] - 1)]
    same = inside & (met == labels[ys, xs][:, None])
    runs = (same & ~np.roll(same, 1, axis=1)).sum(axis=1)
    found = np.zeros(labels.shape, np.bool_)
    found[ys, xs] = (runs <= 1) & ~same.all(axis=1)
    return found


@dataclass
class Count:
    """Labelled pixels by class, and how many of them the mask confirms; mask pixels by class."""

    classes: int
    ends: NDArray[np.int64] = field(init=False)
    rest: NDArray[np.int64] = field(init=False)
    area: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.ends, self.rest = np.zeros((2, self.classes), np.int64), np.zeros((2, self.classes), np.int64)
        self.area = np.zeros(self.classes, np.int64)

    def add(self, labels: NDArray[np.uint8], mask: NDArray[np.uint8], radius: float) -> None:
        """Count one map; pixels that the mask leaves out count nowhere."""
        known = mask != IGNORE_INDEX
        ends = near_ends(labels, radius)
        labelled = (labels != IGNORE_INDEX) & known
        for kind, where in ((self.ends, labelled & ends), (self.rest, labelled & ~ends)):
            kind[0] += np.bincount(labels[where], minlength=self.classes)
            kind[1] += np.bincount(labels[where & (labels == mask)], minlength=self.classes)
        self.area += np.bincount(mask[known], minlength=self.classes)

    def summary(self, names: tuple[str, ...]) -> dict[str, object]:
        """Shares, as in the table."""
        both = self.ends + self.rest
        return {
            "labels": int(both[0].sum()),
            "near ends": float(self.ends[0].sum() / both[0].sum()),
            "right": float(both[1].sum() / both[0].sum()),
            "right near ends": float(self.ends[1].sum() / self.ends[0].sum()),
            "right elsewhere": float(self.rest[1].sum() / self.rest[0].sum()),
            "classes": {
                name: {
                    "of the labels": float(both[0][c] / both[0].sum()),
                    "of the masks": float(self.area[c] / self.area.sum()),
                    "right": float(both[1][c] / both[0][c]) if both[0][c] else None,
                }
                for c, name in enumerate(names)
            },
        }


def native(source: DataSource, names: list[str]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Labels and masks as they are."""
    for name in names:
        yield source.load_labels(name, "scribbles"), source.load_labels(name, "masks")


def crops(
    source: DataSource, names: list[str], scale: tuple[float, float], size: int, each: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Labels and masks of the same training crops."""
    options = Augmentation(size=size, scale=scale, photometric=None)
    labelled, masked = (TrainingSet(source, names, (kind,), options, seed=0) for kind in ("scribbles", "masks"))
    for index in range(len(labelled)):
        for position in range(index * each, (index + 1) * each):
            one, two = labelled[index, position], masked[index, position]
            # A crop without labels is drawn anew, one without a mask is not.
            if bool((one["image"] == two["image"]).all()):
                yield one["labels"].numpy().astype(np.uint8), two["labels"].numpy().astype(np.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("WSSS_SHARED", "../shared")))
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--radius", type=float, default=8, help="of the circle that finds ends, in pixels")
    parser.add_argument("--scale", nargs=2, type=float, default=(0.75, 1.5), help="augmentation.scale of the crops")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    found: dict[str, dict[str, object]] = {}
    print("| set | labels right | near ends (of all labels) | elsewhere |\n|---|---|---|---|")
    for name in options.sets:
        source = SimulatedSource(open_dataset(options.shared / "data" / name), "scribbles", seed=0)
        names = [n for n in source.splits["train"] if source.kinds(n) >= {"masks", "scribbles"}][: options.images]
        for where, maps in (
            ("as they are", native(source, names)),
            ("crops", crops(source, names, tuple(options.scale), options.size, 4)),
        ):
            count = Count(len(source.classes))
            for labels, mask in maps:
                count.add(labels, mask, options.radius)
            row = found[f"{name}, {where}"] = count.summary(tuple(source.classes))
            print(
                f"| {name}, {where} | {100 * row['right']:.1f} % | {100 * row['right near ends']:.1f} % "
                f"({100 * row['near ends']:.0f} %) | {100 * row['right elsewhere']:.1f} % |",
                flush=True,
            )
    for title, row in found.items():
        print(f"\n{title}\n\n| class | of the labels | of the masks | right |\n|---|---|---|---|")
        for name, part in row["classes"].items():
            right = "-" if part["right"] is None else f"{100 * part['right']:.1f} %"
            print(f"| {name} | {100 * part['of the labels']:.1f} % | {100 * part['of the masks']:.1f} % | {right} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
