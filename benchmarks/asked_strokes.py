"""Further strokes where the model asks for them, against as many pixels anywhere: what a second round brings.

    python -m benchmarks.asked_strokes --shared SHARED --out runs --seeds 0 1 2 --strokes 3 \
        --kept benchmarks/results/runs.json

For every seed: the default is trained on simulated scribbles of a set; of every training image its model names the
place that it is least sure of, the strokes so far spread along the image, as the annotation page does (`demo.asking`;
without the card's refinement, which was chosen on val); the truth there, but for classes on less than a quarter of the
place, is stroked through before the next place is asked for; the default is trained anew on all strokes. Beside it,
places of the same size anywhere without a label, until as many pixels have one. Masks enter through the answers alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import zlib
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.real_data import SETTINGS, Setting, add_kept, read_kept, record_name, run, run_options
from demo.asking import place_to_draw, with_strokes
from training.data.dataset import open_dataset
from training.data.simulated import SimulatedSource
from training.data.weak import simulate_scribbles
from wsss_deploy import Segmenter
from wsss_deploy.card import IGNORE_INDEX, palette_bytes
from wsss_deploy.segmentation import Segmentation

#: Part of a place that a class has to take for a stroke of its own.
_PART = 0.25
#: Places anywhere that an image gets at most.
_ATTEMPTS = 30
_BY_NAME = {setting.name: setting for setting in SETTINGS}
#: What can be trained anew; the first round is the default of the same set.
AGAIN = ("voc-scribbles-default", "voc-scribbles-walk-fine", "camvid-scribbles-default")

Labels = NDArray[np.uint8]


def answered(truth: Labels, area: NDArray[np.bool_], rng: np.random.Generator) -> Labels:
    """Strokes through the classes of a place, uint8 (H, W), 255 = none.

    Args:
        truth: The mask.
        area: The place, on a grid that is laid over the image.
        rng: The hand's.
    """
    rows = np.arange(truth.shape[0]) * area.shape[0] // truth.shape[0]
    columns = np.arange(truth.shape[1]) * area.shape[1] // truth.shape[1]
    inside = area[np.ix_(rows, columns)]
    counts = np.bincount(truth[inside], minlength=256)[:IGNORE_INDEX]
    seen = np.where(inside & np.isin(truth, np.flatnonzero(counts >= _PART * inside.sum())), truth, IGNORE_INDEX)
    strokes: Labels = simulate_scribbles(seen.astype(np.uint8), rng)
    return strokes


def anywhere(labelled: NDArray[np.bool_], like: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A disc of the size of a place on its grid, about any cell without a label."""
    cells = np.ones(like.shape, bool)
    at = np.nonzero(labelled)
    cells[at[0] * like.shape[0] // labelled.shape[0], at[1] * like.shape[1] // labelled.shape[1]] = False
    free = np.argwhere(cells)
    row, column = free[int(rng.integers(len(free)))]
    away = np.hypot(*np.ogrid[-row : like.shape[0] - row, -column : like.shape[1] - column])
    return away <= np.sort(away, axis=None)[int(like.sum()) - 1]


def one_image(
    result: Segmentation, given: Labels, truth: Labels, strokes: int, at_random: bool, rng: np.random.Generator
) -> tuple[Labels, list[tuple[int, int]]]:
    """Labels with further strokes; of each place how many pixels got a label, and how many the model had wrong.

    A place whose truth is unknown, or of many classes, stays without.
    """
    labels, tally, areas = given.copy(), [], []

    def draw(area: NDArray[np.bool_]) -> None:
        drawn = answered(truth, area, rng)
        new = (drawn != IGNORE_INDEX) & (labels == IGNORE_INDEX)
        tally.append((int(new.sum()), int((result.mask != drawn)[new].sum())))
        areas.append(area)
        labels[new] = drawn[new]

    for _ in range(strokes):
        place = place_to_draw(with_strokes(result, [labels]), labels != IGNORE_INDEX)
        if place is None:
            break
        draw(place.area)
    if not at_random:
        return labels, tally
    enough, asked = sum(pixels for pixels, _ in tally), areas.copy()
    labels[:] = given
    tally.clear()
    # Strokes through round places are shorter than those through long ones, so that more of them are drawn.
    for attempt in range(_ATTEMPTS):
        if sum(pixels for pixels, _ in tally) >= enough:
            break
        draw(anywhere(labels != IGNORE_INDEX, asked[attempt % len(asked)], rng))
    return labels, tally


def write_copy(data: Path, copy: Path, model: Path, strokes: int, at_random: bool) -> dict[str, float]:
    """A copy of the set with scribbles of its training images: simulated ones and the further ones."""
    record = copy / "asked.json"
    if record.is_file():
        return dict(json.loads(record.read_text()))
    source = SimulatedSource(open_dataset(data), "scribbles", 0)
    partial = copy.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "scribbles").mkdir(parents=True)
    for path in data.iterdir():
        (partial / path.name).symlink_to(path.resolve())
    segmenter, tallies, before = Segmenter(model, refine=False), [], 0
    names = source.splits["train"]
    for name in names:
        rng = np.random.default_rng([7, zlib.crc32(name.encode())])
        given, truth = source.load_labels(name, "scribbles"), source.load_labels(name, "masks")
        labels, tally = one_image(segmenter.predict(source.load_image(name)), given, truth, strokes, at_random, rng)
        before += int((given != IGNORE_INDEX).sum())
        tallies += tally
        image = Image.fromarray(labels, "P")
        image.putpalette(palette_bytes(source.palette))
        image.save(partial / "scribbles" / f"{name}.png")
    if not tallies:
        raise SystemExit(f"{model} asks for no stroke in any image")
    pixels, wrong = np.array(tallies).sum(axis=0)
    found = {
        "places": len(tallies) / len(names),
        "pixels": float(pixels / before),
        "wrong": float(wrong / pixels),
    }
    (partial / record.name).write_text(json.dumps(found))
    partial.rename(copy)
    return found


def _set(setting: Setting) -> str:
    return setting.name.split("-")[0]


def trained_anew(setting: Setting, way: str, strokes: int, seed: int, options: argparse.Namespace) -> dict:
    """The record of a run on all strokes, with what `write_copy` tells of the further ones."""
    name = f"{setting.name}-{way}-{strokes}"
    kept = read_kept(options.kept).get(record_name(name, seed, options))
    if kept is not None:
        return kept
    # The first round's model is needed, not just its record.
    here = argparse.Namespace(**vars(options) | {"kept": None, "keep": False})
    first = f"{_set(setting)}-scribbles-default"
    run(_BY_NAME[first], seed, here)
    copy = (options.out / f"{setting.data}-{way}-{strokes}-{seed}").resolve()
    model = options.out / f"{first}-{seed}" / "model.pt"
    asked = write_copy(options.shared / "data" / setting.data, copy, model, strokes, way == "random")
    again = Setting(name, str(copy), setting.supervision, setting.method, extra=setting.extra)
    record = run(again, seed, here) | {"asked": asked}
    if options.keep:
        add_kept(options.kept, record_name(name, seed, options), record)
    return record


def line(title: str, runs: list[dict], twin: list[float], base: list[float]) -> str:
    """A row of the table; the gain is over the runs of the first round with the same seeds."""
    values = [run["evaluation"]["miou"] for run in runs]
    gains = [value - first for value, first in zip(values, base, strict=True)]
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    share = f"{statistics.mean(values) / statistics.mean(twin):.1%}" if twin else "-"
    asked = [run["asked"] for run in runs if "asked" in run]
    drawn = (
        f"{statistics.mean(found['places'] for found in asked):.1f} | "
        f"+{statistics.mean(found['pixels'] for found in asked):.0%} | "
        f"{statistics.mean(found['wrong'] for found in asked):.0%}"
        if asked
        else "- | - | -"
    )
    return (
        f"| {title} | {drawn} | {', '.join(f'{100 * value:.1f}' for value in values)} | "
        f"{100 * statistics.mean(values):.1f}{spread} | {share} | "
        f"{', '.join(f'{100 * gain:+.1f}' for gain in gains)} |"
    )


def main() -> int:
    parser = run_options(__doc__)
    parser.add_argument("--strokes", nargs="*", type=int, default=[3], help="places asked for in an image")
    parser.add_argument("--setting", default=AGAIN[0], choices=AGAIN, help="what is trained anew")
    parser.add_argument("--ways", nargs="*", choices=("asked", "random"), default=["asked", "random"])
    parser.add_argument("--no-twin", action="store_true", help="leave the row of masks out")
    options = parser.parse_args()
    if options.keep and not options.kept:
        parser.error("--keep needs --kept FILE, to which the records are added")
    setting = _BY_NAME[options.setting]
    found = {
        (way, strokes): [trained_anew(setting, way, strokes, seed, options) for seed in options.seeds]
        for strokes in options.strokes
        for way in options.ways
    }
    first = [run(setting, seed, options) for seed in options.seeds]
    twins = [run(_BY_NAME[f"{_set(setting)}-masks"], seed, options) for seed in options.seeds if not options.no_twin]
    twin, base = ([record["evaluation"]["miou"] for record in records] for records in (twins, first))
    print(
        "| | places an image | pixels with a label | of these the model had wrong | by seed | mIoU | of twin | gain |"
    )
    print("|---|---|---|---|---|---|---|---|")
    if twins:
        print(line("masks (the twin)", twins, twin, base))
    print(line(f"{options.setting}, first round", first, twin, base))
    for (way, strokes), runs in found.items():
        asked = f"{strokes} further {'place' if strokes == 1 else 'places'} where the model asks"
        print(line(asked if way == "asked" else f"as many pixels as in {strokes}, anywhere", runs, twin, base))
    one = first[0]
    print(
        f"\nProtocol: {setting.data}, simulated scribbles, further strokes through the truth at "
        f"places chosen by the default's model of the same seed; ViT-Tiny (supervised ImageNet weights), "
        f"{options.iterations} iterations, crop {options.size}, val split at native size, network at "
        f"{one['evaluation']['protocol']['resolution']}, one scale, no flip, no CRF, no tags at test time, the last "
        f"state, seeds {options.seeds}; spread is the sample standard deviation. torch {one['versions']['torch']}, "
        f"{date.today()}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
