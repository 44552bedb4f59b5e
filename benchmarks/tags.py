"""The ladder of training from image tags: CAM, pseudo-label and val mIoU of each step, with the protocol.

Runs `wsss-train --supervision tags` in a process of its own for every row and seed. Finished runs are kept in --out
and not repeated; rows that differ in the making of labels only share one trained classifier. CAMs and pseudo-labels
are scored on train images with masks, which no training reads.

    python benchmarks/tags.py --shared SHARED --out runs --rows plain par varm --seeds 0 --json tags.json --check

--cams-only stops after the first stage: CAMs and pseudo-labels of the scored images, no segmenter.
--long-tail trains on a part of the set in which the commonest class has ten times the images of the rarest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """One step of the ladder; `stage_of` names the row whose trained classifier it takes over."""

    name: str
    method: str
    settings: tuple[str, ...] = ()
    stage_of: str = ""


_ONE = "cams.scales=[1.0]"
_UNCALIBRATED = ("cams.prototype_weight=0", "cams.scale_weight=0", "cams.fusion=0")
_SHARED = ("cams.kind=shared_feature", "labels.high=0.45", "labels.low=0.25")  # as `sfc` has them
_LEARNING = ("cams.kind=classifier", _ONE)
# A run that takes over a classifier starts from that run's recipe, so what differs from it is named.
_FIRST = "tokens-plain"
_VARM = ("labels.refiner=varm",)
_RGB = "labels.guide=rgb"
_CALIBRATED = (*_VARM, "cams.calibration={}")
ROWS = (
    # Classifiers that learn together with the encoder, as published methods have it.
    Row("plain", "tags", (*_LEARNING, "labels.refiner=off")),
    # What decides about it: the encoder's rate, the part of the cells that makes the score, the depth, the classifier's
    # rate, whether the first layers learn.
    Row("plain-rate", "tags", (*_LEARNING, "cam_learning_rate=1e-4", "cam_head_factor=30")),
    Row("plain-average", "tags", (*_LEARNING, "cams.pooling=1.0")),
    Row("plain-depth", "tags", (*_LEARNING, f"cams.depths=[{10 / 12}]", f"cams.depth={10 / 12}")),
    Row("plain-head", "tags", (*_LEARNING, "labels.refiner=off", "cam_head_factor=50")),
    Row("plain-thawed", "tags", (*_LEARNING, "labels.refiner=off", "cam_frozen=0")),
    Row("par", "tags", (*_LEARNING, "labels.refiner=par", _RGB), "plain"),
    Row("varm", "tags", (*_LEARNING, "labels.refiner=varm", _RGB), "plain"),
    Row("opponent", "tags", (*_LEARNING, "labels.refiner=varm"), "plain"),
    # CAMs of these at one scale and its mirror, which single stages take in every step.
    Row("single", "tscd", (_ONE, "affinity_weight=0", "correspondence_weight=0", "consistency_weight=0")),
    Row("affinity", "tscd", (_ONE, "correspondence_weight=0", "consistency_weight=0")),
    Row("propagated", "tscd", (_ONE, "correspondence_weight=0", "consistency_weight=0", "propagation_start=0.3")),
    Row("scd", "tscd", (_ONE, "consistency_weight=0")),
    Row("scd-repaired", "tscd", (_ONE, "consistency_weight=0", "correspondence=repaired")),
    Row("tscd", "tscd", (_ONE,)),
    # SFC's bank, losses and fused CAMs within that single stage.
    Row("affinity-sfc", "tscd", (_ONE, *_SHARED, "correspondence_weight=0", "consistency_weight=0")),
    Row("tscd-sfc", "tscd", (_ONE, *_SHARED)),
    Row("sfc-plain", "sfc", (_ONE, "cams.bank_draws=0", *_UNCALIBRATED)),
    Row("sfc-bank", "sfc", (_ONE, *_UNCALIBRATED)),
    Row("sfc-prototype", "sfc", (_ONE, "cams.scale_weight=0")),
    Row("sfc-even", "sfc", (_ONE, "cams.coefficients=false")),
    Row("sfc", "sfc", (_ONE,)),
    # Linear classifiers on the tokens of a frozen encoder: of images alone, then of positions; refined by nothing, PAR
    # or VARM, these on colours as they are or on opponent colours; along attention, then along the correlation of
    # features and with prototypes as well (the default); with self correspondence distillation of the segmenter. What
    # a row takes over from another is its classifier alone.
    Row("tokens-images", "tags", ("cams.rounds=0", "cams.calibration=null", "labels.refiner=off")),
    Row("tokens-plain", "tags", ("cams.calibration=null", "labels.refiner=off")),
    Row("tokens-par", "tags", ("cams.calibration=null", "labels.refiner=par", _RGB), "tokens-plain"),
    Row("tokens-varm", "tags", ("cams.calibration=null", *_VARM, _RGB), "tokens-plain"),
    Row("tokens-opponent", "tags", ("cams.calibration=null", *_VARM), "tokens-plain"),
    Row("tokens-affinity", "tags", (*_CALIBRATED, "cams.calibration.steps=0", "cams.calibration.fusion=0"), _FIRST),
    Row("tokens-correlation", "tags", (*_CALIBRATED, "cams.calibration.fusion=0"), _FIRST),
    Row("tokens-sfc", "tags", _CALIBRATED, _FIRST),
    Row("tokens-scd", "tags", (*_CALIBRATED, "correspondence_weight=1"), _FIRST),
    Row("tokens-scd-parity", "tags", (*_CALIBRATED, "correspondence_weight=1", "correspondence=parity"), _FIRST),
    # Variations of the default.
    Row("tokens-sure", "tags", (*_CALIBRATED, "labels.sure=0.4"), _FIRST),
    Row("tokens-correction", "tags", (*_CALIBRATED, "correction={}"), _FIRST),
    Row("tokens-falling", "tags", (*_CALIBRATED, "correction={final_threshold: 0.5}"), _FIRST),
    Row("tokens-crf", "tags", (*_CALIBRATED, "crf_weight=0.1"), _FIRST),
)
TWIN = Row("masks", "supervised")
# What `wsss-train --supervision tags` does without any option.
DEFAULT = "tokens-sfc"

# Room of the commonest class of the long-tailed set over that of the rarest. Images of several classes are left out
# once one of these is full, so that of the commonest there are fewer than room: about ten times the rarest.
TAIL = 16
# Lowest acceptable part of the supervised twin's mIoU; the aim is 0.92.
GOAL = 0.85
# (better, worse): each published component should pay.
ORDER = (
    ("par", "plain"),
    ("varm", "par"),
    ("affinity", "single"),
    ("propagated", "affinity"),
    ("scd", "affinity"),
    ("affinity-sfc", "affinity"),
    ("tscd-sfc", "tscd"),
    ("tscd", "scd"),
    ("sfc", "sfc-plain"),
    ("sfc-bank", "sfc-plain"),
    ("sfc-prototype", "sfc-bank"),
    ("sfc", "sfc-prototype"),
    ("sfc", "sfc-even"),
    ("tokens-plain", "tokens-images"),
    ("tokens-par", "tokens-plain"),
    ("tokens-varm", "tokens-par"),
    ("tokens-opponent", "tokens-varm"),
    ("tokens-affinity", "tokens-opponent"),
    ("tokens-sfc", "tokens-affinity"),
    ("tokens-scd", "tokens-sfc"),
)


def data_folder(options: argparse.Namespace) -> Path:
    """The data set, or its long-tailed part: links to its files and a shorter training split, always the same."""
    whole = options.shared / "data" / "voc_animals"
    if not options.long_tail:
        return whole
    names = (whole / "splits" / "train.txt").read_text().split()
    chosen = long_tail(names, json.loads((whole / "tags.json").read_text()))
    return linked_part(whole, options.out / "voc_animals_long_tail", chosen)


def linked_part(whole: Path, folder: Path, names: list[str]) -> Path:
    """A data set whose training split has these names alone: links to the files of the whole one. Made once."""
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "splits").mkdir(parents=True)
        for path in whole.iterdir():
            if path.name != "splits":
                (partial / path.name).symlink_to(path.resolve())
        (partial / "splits" / "train.txt").write_text("\n".join(names) + "\n")
        shutil.copy(whole / "splits" / "val.txt", partial / "splits")
        partial.rename(folder)
    return folder


def long_tail(names: list[str], tags: dict[str, list[int]]) -> list[str]:
    """Images of which at most TAIL ** -(k / (K - 1)) times as many as the first class has hold the k-th of K.

    Classes keep their order by frequency. Images are gone through in one fixed order, and taken while every class in
    them still has room.
    """
    names = [name for name in names if name in tags]
    counts = Counter(kind for name in names for kind in tags[name])
    order = [kind for kind, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    room = {kind: round(counts[order[0]] * TAIL ** -(rank / max(1, len(order) - 1))) for rank, kind in enumerate(order)}
    chosen = []
    for index in np.random.default_rng(0).permutation(len(names)):
        if all(room[kind] > 0 for kind in tags[names[index]]):
            chosen.append(names[index])
            for kind in tags[names[index]]:
                room[kind] -= 1
    return sorted(chosen)


def run(row: Row, seed: int, options: argparse.Namespace) -> dict:
    """Train one row with one seed, or read the finished run."""
    folder = options.out / f"{prefix(options)}-{row.name}-{seed}"
    record = folder / "run.json"
    if not record.is_file():
        first = options.out / f"{prefix(options)}-{row.stage_of}-{seed}"
        if row.stage_of and (first / "cams").is_dir() and not folder.exists():
            folder.mkdir()
            shutil.copytree(first / "cams", folder / "cams")
            shutil.copy(first / "recipe.yaml", folder)
        command = [sys.executable, "-m", "training.cli", str(data_folder(options))]
        command += [
            "--supervision",
            "masks" if row is TWIN else "tags",
            "--weights",
            weights(options),
            "--seed",
            str(seed),
        ]
        command += ["--iterations", str(options.iterations), "--size", str(options.size), "--out", str(folder)]
        # One evaluation, at the end: nothing is chosen on the images that judge.
        command += ["--set", f"evaluation.every={options.iterations}"]
        command += ["--method", row.method]
        # The segmenter that learns from tags has one rate for all layers; so has its twin.
        for text in ("layer_decay=1", "learning_rate=1e-4", "decoder_factor=10") if row is TWIN else ():
            command += ["--set", f"optimisation.{text}"]
        for text in row.settings:
            command += ["--set", f"method.{text}"]
        if (folder / "recipe.yaml").is_file():
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(record.read_text())
    scores = folder / f"scores_{options.images}.json"
    if not scores.is_file():
        values = {"cam": cam_miou(folder, found, options), "pseudo": pseudo_miou(folder, found, options)}
        scores.write_text(json.dumps(values))
    return found | json.loads(scores.read_text())


def cams_only(row: Row, seed: int, options: argparse.Namespace) -> dict:
    """Train a row's first stage alone and score what comes of it."""
    from training.cam.scoring import score_cams, score_labels
    from training.cam_stage import LABELS, add_pseudo_labels
    from training.recipe import parse_assignments
    from training.run import resolve_recipe

    folder = options.out / f"{prefix(options)}-cams-{row.name}-{seed}"
    record = folder / "scores.json"
    if not record.is_file():
        source = open_source(options)
        given = {
            "seed": seed,
            "model": {"weights": weights(options)},
            "augmentation": {"size": options.size},
            "method": {"name": row.method},
        }
        settings = parse_assignments([f"method.{text}" for text in row.settings])
        recipe = resolve_recipe(source, "tags", [given, settings])
        names = scored_names(source, options)
        add_pseudo_labels(recipe, source, folder, False, names=names)
        scores = {
            "cam": score_cams(source, recipe, folder, names),
            "pseudo": score_labels(source, folder / LABELS, names),
        }
        record.write_text(json.dumps(scores))
    return json.loads(record.read_text())


def cams_table(rows: dict[str, list[dict]], options: argparse.Namespace) -> str:
    """First stages as a Markdown table with one protocol line."""
    lines = [
        "| row | CAM mIoU (best background score), by seed | pseudo-label mIoU (sure pixels), by seed |",
        "|---|---|---|",
    ]
    for name, records in rows.items():
        cams = ", ".join(f"{100 * r['cam']['miou']:.1f} ({r['cam']['background']})" for r in records)
        labels = ", ".join(f"{100 * r['pseudo']['miou']:.1f} ({100 * r['pseudo']['sure']:.0f} %)" for r in records)
        lines.append(f"| {name} | {cams} | {labels} |")
    lines += [
        "",
        f"Protocol: {data_words(options)}, image tags only; ViT-Tiny with supervised ImageNet weights; first stages "
        f"alone, crop {options.size}, 400 iterations of batch 8 where the encoder learns; {options.images} train "
        f"images with masks, at their own size, with their tags; seeds {options.seeds}. torch {torch.__version__}, "
        f"{date.today()}.",
    ]
    return "\n".join(lines)


def weights(options: argparse.Namespace) -> str:
    """File of the pretrained encoder."""
    return str(options.shared / "weights" / "vit_tiny_patch16_224.safetensors")


def prefix(options: argparse.Namespace) -> str:
    """Of the folders of runs."""
    return "tags-long-tail" if options.long_tail else "tags"


def data_words(options: argparse.Namespace) -> str:
    """The data set, for a protocol line."""
    if not options.long_tail:
        return "voc_animals"
    source = open_source(options)
    counts = zip(source.classes[1:], class_counts(options), strict=True)
    images = ", ".join(f"{name} {count}" for name, count in counts)
    return f"voc_animals, long-tailed ({len(source.splits['train'])} training images: {images})"


def class_counts(options: argparse.Namespace) -> list[int]:
    """Training images by foreground class."""
    source = open_source(options)
    found = Counter(kind for name in source.splits["train"] for kind in source.tags(name) or ())
    return [found[kind] for kind in range(1, len(source.classes))]


def scored_names(source, options: argparse.Namespace) -> list[str]:
    """The same train images for every row."""
    names = sorted(source.splits["train"])
    order = np.random.default_rng(0).permutation(len(names))
    return [names[index] for index in order[: options.images]]


def open_source(options: argparse.Namespace):
    from training.data.dataset import open_dataset

    return open_dataset(data_folder(options))


def pseudo_miou(folder: Path, record: dict, options: argparse.Namespace) -> dict | None:
    """The mIoU of the pseudo-labels where they are sure, and the part of pixels that is."""
    from training.cam.scoring import score_labels, score_made_labels
    from training.cam_stage import LABELS
    from training.run import build_recipe

    source = open_source(options)
    if record["recipe"]["method"]["name"] == "tscd":
        return score_made_labels(source, build_recipe(record["recipe"]), folder, scored_names(source, options))
    if not (folder / LABELS).is_dir():
        return None
    return score_labels(source, folder / LABELS, scored_names(source, options))


def cam_miou(folder: Path, record: dict, options: argparse.Namespace) -> dict | None:
    """The mIoU of plain thresholded CAMs at the best of a few background scores, and that score."""
    from training.cam.scoring import score_cams
    from training.run import build_recipe

    if not (folder / "cams").is_dir() and record["recipe"]["method"]["name"] != "tscd":
        return None
    source = open_source(options)
    return score_cams(source, build_recipe(record["recipe"]), folder, scored_names(source, options))


def summarise(row: Row, records: list[dict], counts: list[int]) -> dict:
    """Means over seeds; what a row does not have is None. `counts` are training images by foreground class."""

    def mean(kind: str, key: str) -> float | None:
        values = [record[kind][key] for record in records if record[kind] is not None]
        return statistics.mean(values) if values else None

    values = [record["evaluation"]["miou"] for record in records]
    ious = np.array([list(record["evaluation"]["iou"].values())[1:] for record in records], float)
    order = np.argsort(counts, kind="stable")
    return {
        "row": row.name,
        "cam": mean("cam", "miou"),
        "cam_background": mean("cam", "background"),
        "pseudo": mean("pseudo", "miou"),
        "sure": mean("pseudo", "sure"),
        "values": values,
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        # Of the two commonest classes over the two rarest.
        "gap": float(np.nanmean(ious[:, order[-2:]]) - np.nanmean(ious[:, order[:2]])),
        "rarest": float(np.nanmean(ious[:, order[:2]])),
        "seconds": statistics.mean(record["training_seconds"] for record in records),
    }


def table(rows: list[dict], options: argparse.Namespace, record: dict) -> str:
    """The rows as a Markdown table with one protocol line."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    twin = next((row["mean"] for row in rows if row["row"] == TWIN.name), None)
    lines = [
        "| row | CAM | pseudo-labels (sure) | val mIoU ± spread | of twin | gap (rarest) | training s (last stage) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "-" if twin is None else f"{100 * row['mean'] / twin:.1f} %"
        lines.append(
            f"| {row['row']} | {percent(row['cam'])} | {percent(row['pseudo'])} ({percent(row['sure'])} %) "
            f"| {percent(row['mean'])} ± {percent(row['spread'])} | {share} "
            f"| {percent(row['gap'])} ({percent(row['rarest'])}) | {row['seconds']:.0f} |"
        )
    protocol = record["evaluation"]["protocol"]
    lines += [
        "",
        f"Protocol: {data_words(options)}, image tags only; ViT-Tiny with supervised ImageNet weights, which make cats "
        f"and dogs easy; {options.iterations} iterations of batch {record['recipe']['optimisation']['batch_size']} "
        f"after the first stage (400 where the encoder learns in it), crop {options.size}; CAMs and "
        f"pseudo-labels on {options.images} train images with masks (CAM: best of a few background scores on them); "
        f"val split at native size, network at {protocol['resolution']}, one scale, no flip, no CRF, no tags at test "
        f"time, the last state, seeds {options.seeds}; gap: IoU of the two commonest classes "
        f"minus that of the two rarest. {platform.machine()}, {record['threads']} threads, torch "
        f"{record['versions']['torch']}, {date.today()}.",
    ]
    return "\n".join(lines)


def check(rows: list[dict]) -> list[str]:
    """What misses its goal."""
    means = {row["row"]: row["mean"] for row in rows}
    missed = [f"{name}: not run" for name in (DEFAULT, TWIN.name) if name not in means]
    if not missed and means[DEFAULT] < GOAL * means[TWIN.name]:
        missed.append(f"{DEFAULT}: {means[DEFAULT]:.4f} is below {GOAL} of the twin's {means[TWIN.name]:.4f}")
    return missed + [
        f"{better} ({means[better]:.4f}) is not above {worse} ({means[worse]:.4f})"
        for better, worse in ORDER
        if better in means and worse in means and means[better] <= means[worse]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("WSSS_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--rows", nargs="*", default=[row.name for row in (*ROWS, TWIN)])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=100, help="train images on which CAMs and labels are scored")
    parser.add_argument("--cams-only", action="store_true", help="first stages alone")
    parser.add_argument("--long-tail", action="store_true", help="train on the long-tailed part of the set")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cams_only:
        chosen = [row for row in ROWS if row.name in options.rows and row.method in ("tags", "sfc")]
        print(
            cams_table({row.name: [cams_only(row, seed, options) for seed in options.seeds] for row in chosen}, options)
        )
        return 0
    rows, record = [], {}
    for row in (*ROWS, TWIN):
        if row.name in options.rows:
            records = [run(row, seed, options) for seed in options.seeds]
            rows.append(summarise(row, records, class_counts(options)))
            record = records[0]
    print(table(rows, options, record))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "date": str(date.today())}, indent=1) + "\n")
    missed = check(rows) if options.check else []
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
