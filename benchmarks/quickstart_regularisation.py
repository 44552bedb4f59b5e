"""What the Gated CRF loss adds to the quickstart: the same scenes, network and schedule with and without it.

    python benchmarks/quickstart_regularisation.py --seeds 0 1 2 --json results.json --check

Every run trains as `wsss-quickstart` does, from scribbles, from scratch; figures are those of whole validation scenes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from training.data.dataset import open_dataset
from training.data.synthetic import write_scenes
from training.quickstart import RECIPE, TRAIN_SCENES, VAL_SCENES
from training.run import resolve_recipe, run

METHODS = ("partial_ce", "gated_crf")
# mIoU of the quickstart's own method for every seed, and what the regularised loss adds on average.
LOWEST_MIOU, LEAST_GAIN = 0.80, 0.02


def measure(method: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train once; figures of the validation scenes."""
    source = open_dataset(data)
    steps = RECIPE["optimisation"]["iterations"]
    chosen: dict[str, Any] = {"seed": seed, "evaluation": {"every": steps}}
    if method != RECIPE["method"]["name"]:
        chosen["method"] = {"name": method}
    trained = run(resolve_recipe(source, None, [RECIPE, chosen]), source, folder, show=False).trained
    assert trained.result is not None
    return {
        "method": method,
        "seed": seed,
        "miou": trained.result.miou,
        "boundary": trained.result.mean_boundary_iou,
        "seconds": trained.seconds,
    }


def table(runs: list[dict[str, Any]], seeds: list[int]) -> str:
    """Markdown: one line a method, then the protocol."""
    lines = ["| method | mIoU by seed | mIoU mean ± spread | boundary mIoU | training s |", "|---|---|---|---|---|"]
    for method in METHODS:
        mine = [entry for entry in runs if entry["method"] == method]
        values = [entry["miou"] for entry in mine]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"| {method} | {', '.join(f'{value:.3f}' for value in values)} "
            f"| {statistics.mean(values):.3f} ± {spread:.3f} "
            f"| {statistics.mean(entry['boundary'] for entry in mine):.3f} "
            f"| {statistics.mean(entry['seconds'] for entry in mine):.0f} |"
        )
    optimisation = RECIPE["optimisation"]
    lines += [
        f"| gain | | {gain(runs):+.3f} | | |",
        "",
        f"Protocol: {TRAIN_SCENES} training and {VAL_SCENES} validation scenes drawn from each seed, scribbles, "
        f"{RECIPE['model']['encoder']} made smaller, random start, {optimisation['iterations']} iterations of batch "
        f"{optimisation['batch_size']}, size {RECIPE['augmentation']['size']}, last state, whole scenes at native "
        f"size, one scale, no flip; seeds {seeds}; spread is the sample standard deviation. {processor()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}, {date.today()}.",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gain(runs: list[dict[str, Any]]) -> float:
    """Mean mIoU with the regularised loss minus that without it."""
    without, with_loss = (statistics.mean(run["miou"] for run in runs if run["method"] == name) for name in METHODS)
    return with_loss - without


def check(runs: list[dict[str, Any]]) -> list[str]:
    """What misses its goal."""
    missed = [
        f"gated_crf, seed {entry['seed']}: mIoU {entry['miou']:.4f}, goal {LOWEST_MIOU}"
        for entry in runs
        if entry["method"] == "gated_crf" and entry["miou"] < LOWEST_MIOU
    ]
    if gain(runs) < LEAST_GAIN:
        missed.append(f"gain of gated_crf over partial_ce: {gain(runs):+.4f}, goal {LEAST_GAIN:+}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the figures of every run")
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    options = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            data = write_scenes(Path(folder) / f"data{seed}", TRAIN_SCENES, VAL_SCENES, seed=seed)
            for method in METHODS:
                runs.append(measure(method, seed, data, Path(folder) / f"{method}{seed}"))
                print(f"{method} seed {seed}: mIoU {runs[-1]['miou']:.4f}", file=sys.stderr, flush=True)
    print(table(runs, options.seeds))
    if options.json:
        options.json.write_text(json.dumps({"runs": runs, "gain": gain(runs), "date": str(date.today())}, indent=1))
    missed = check(runs) if options.check else []
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
