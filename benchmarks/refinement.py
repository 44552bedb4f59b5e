"""What refining a network's scores adds, and which refinement: mIoU and boundary IoU of finished models on a val split.

    python -m benchmarks.refinement DATA MODEL [MODEL ...] [--data DATA MODEL ...] --cache CACHE [--json FILE] [--check]

Every network runs once, its scores are kept in CACHE. All candidates are tried on every third image; the best few by
their mean gain, and `DEFAULT` and `STRONG` of `wsss_deploy.refinement`, on the whole split. Figures are at native
size, one scale, no flip. The cost is measured through `Segmenter` in torch, network and image at 512 x 512 pixels.

--check: the default gains on every model, and the strong form takes at most 15 % of a prediction.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._refinement_scores import GUIDES, Candidate, Model, load, mean_gain, measure
from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model
from wsss_deploy.card import Sizing
from wsss_deploy.networks import restore_network
from wsss_deploy.pairwise import GaussianTerm, MeanField, PairwiseParameters, native
from wsss_deploy.refinement import DEFAULT, STRONG

NONE = Candidate(None)
CHOSEN = Candidate(DEFAULT.parameters, DEFAULT.guide)
WIDER = Candidate(STRONG.parameters, STRONG.guide)
OFFICIAL = (1, 2, 4, 8, 12, 24)
RINGS = ((1, 2, 4), (2, 4, 8, 16), (1, 2, 4, 8), OFFICIAL)
WIDE_EVERY, FINALISTS, MOST_COST = 3, 4, 0.15


def candidates() -> list[Candidate]:
    """What is tried: kinds, neighbours and steps over colours; then guides, sizes and forms around the best of them."""

    def plain(kind: str, rings: tuple[int, ...], steps: int, **more: Any) -> PairwiseParameters:
        return PairwiseParameters(kind=kind, dilations=rings, iterations=steps, normalise=True, **more)

    def gaussian(colour: float, features: float | None = None) -> dict[str, Any]:
        return {"terms": (GaussianTerm(sigma_rgb=colour, sigma_features=features),)}

    tried = [
        Candidate(plain("par", rings, steps), guide)
        for guide in ("rgb", "opponent", "lab")
        for rings in RINGS
        for steps in (2, 5, 8, 12)
    ]
    tried += [Candidate(plain("varm", rings, 5), guide) for guide in ("rgb", "opponent") for rings in RINGS[1::2]]
    tried += [
        Candidate(plain("gaussian", rings, 5, **gaussian(colour)), guide)
        for guide in ("rgb", "opponent", "lab")
        for rings in RINGS[1::2]
        for colour in (0.03, 0.05, 0.1, 0.2)
    ]
    middle, best = plain("par", OFFICIAL, 5), plain("par", RINGS[1], 8)
    tried += [Candidate(parameters, guide) for parameters in (middle, best) for guide in GUIDES[3:]]
    tried += [
        Candidate(plain("gaussian", OFFICIAL, 5, **gaussian(0.05, features)), guide)
        for guide, sigmas in (("rgb+features", (0.5, 1.0, 2.0)), ("rgb+scores", (0.2, 0.5)))
        for features in sigmas
    ]
    tried += [Candidate(parameters, guide, native=True) for parameters in (middle, best) for guide in GUIDES[:2]]
    tried += [
        Candidate(best.model_copy(update={"mean_field": MeanField(compatibility=strength)}), "opponent")
        for strength in (1.0, 3.0, 10.0)
    ]
    tried += [Candidate(plain("par", RINGS[1], 8, bandwidth=width), "opponent") for width in (0.15, 0.6)]
    return list(dict.fromkeys([CHOSEN, WIDER, *tried]))


def cost(path: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of a prediction's stages at 512 x 512 pixels, the least of several, and the refinement's part."""
    rows, columns = np.mgrid[0:512, 0:512]
    rng = np.random.default_rng(0)
    image = np.stack([rows // 2, columns // 2, (rows + columns) // 4], axis=2) + rng.integers(0, 20, (512, 512, 3))
    card, state_dict = load_model(path)
    card = card.model_copy(update={"sizing": Sizing(long_side=512)})
    segmenter = Segmenter.from_network(restore_network(card, state_dict, str(path)), card, refine=STRONG)
    runs = [segmenter.predict(image.astype(np.uint8)).timing for _ in range(repeats)]
    best = {stage: min(run[stage] for run in runs) for stage in runs[0]}
    return {**best, "share": best["refinement"] / sum(best.values())}


def table(models: list[Model], rows: dict[Candidate, list[dict[str, float]]], base: list[dict[str, float]]) -> str:
    """Markdown: candidates by falling mean gain, in points."""
    names = " | ".join(model.name for model in models)
    lines = [
        f"| refinement | guide | mean gain | {names} | CPU ms |",
        "|---|---|---|" + "---|" * (len(models) + 1),
        "| none | - | mIoU, boundary | "
        + " | ".join(f"{100 * row['miou']:.2f}, {100 * row['boundary']:.2f}" for row in base)
        + " | - |",
    ]
    for candidate, figures in sorted(rows.items(), key=lambda item: -mean_gain(item[1], base, "miou")):
        gains = [
            f"{100 * (row['miou'] - before['miou']):+.2f}, {100 * (row['boundary'] - before['boundary']):+.2f}"
            for row, before in zip(figures, base, strict=True)
        ]
        mean = ", ".join(f"{100 * mean_gain(figures, base, figure):+.2f}" for figure in ("miou", "boundary"))
        milliseconds = statistics.mean(row["cpu_ms"] for row in figures)
        chosen = {CHOSEN: " **(default)**", WIDER: " **(strong)**"}.get(candidate, "")
        lines.append(f"| {candidate}{chosen} | {candidate.guide} | {mean} | {' | '.join(gains)} | {milliseconds:.0f} |")
    return "\n".join(lines)


def protocol(models: list[Model], arguments: argparse.Namespace) -> str:
    """One line that says how the figures came about."""
    sizes = sorted({f"long side {model.card.sizing.long_side or 'native'}" for model in models})
    images = ", ".join(f"{model.name} {len(model.samples)}" for model in models)
    return (
        f"Protocol: split '{arguments.split}' at native size, images: {images}; network at {', '.join(sizes)} px, one "
        f"scale, no flip; gains in points of mIoU and boundary IoU; CPU ms of the operator, median image, one thread "
        f"({native.load()[1]}). {platform.machine()}, torch {torch.__version__.split('+')[0]}, {date.today()}."
    )


def check(rows: dict[Candidate, list[dict[str, float]]], base: list[dict[str, float]], costs: list[dict]) -> list[str]:
    """What misses its goal."""
    missed = [
        f"model {index}: the default changes {figure} by {100 * (row[figure] - before[figure]):+.2f} points"
        for index, (row, before) in enumerate(zip(rows[CHOSEN], base, strict=True))
        for figure in ("miou", "boundary")
        if row[figure] <= before[figure]
    ]
    worst = max(item["share"] for item in costs)
    return missed + ([f"refinement takes {worst:.1%} of a prediction, goal {MOST_COST:.0%}"] * (worst > MOST_COST))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="+", type=Path, metavar="PATH", help="a data set and models trained on it")
    parser.add_argument("--data", nargs="+", type=Path, action="append", default=[], help="another data set and models")
    parser.add_argument("--split", default="val")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the networks' scores")
    parser.add_argument("--repeats", type=int, default=15, help="predictions of which the quickest counts")
    parser.add_argument("--default-only", action="store_true", help="no search: the default and the strong form alone")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(path, group[0]) for group in [arguments.first, *arguments.data] for path in group[1:]]
    if not pairs:
        parser.error("give a data set and at least one model")
    models = [load(path, data, arguments.split, 1, arguments.cache) for path, data in pairs]
    names = Counter(model.name for model in models)
    assert max(names.values()) == 1, "models are told apart by the names of their folders"

    wide: dict[Candidate, list[dict[str, float]]] = {}
    finalists = [CHOSEN, WIDER]
    if not arguments.default_only:
        base = [measure(model, NONE, WIDE_EVERY) for model in models]
        for candidate in candidates():
            wide[candidate] = [measure(model, candidate, WIDE_EVERY) for model in models]
            gain = mean_gain(wide[candidate], base, "miou")
            print(f"{100 * gain:+.2f}  {candidate}, {candidate.guide}", file=sys.stderr, flush=True)
        print(f"Every {WIDE_EVERY}rd image:\n\n{table(models, wide, base)}\n")
        best = sorted(wide, key=lambda item: -mean_gain(wide[item], base, "miou"))
        finalists = list(dict.fromkeys([CHOSEN, WIDER, *best[:FINALISTS]]))
    base = [measure(model, NONE) for model in models]
    final = {candidate: [measure(model, candidate) for model in models] for candidate in finalists}
    costs = [cost(path, arguments.repeats) for path, _ in pairs]
    print(f"Whole split:\n\n{table(models, final, base)}\n")
    shares = ", ".join(f"{model.name} {item['share']:.1%}" for model, item in zip(models, costs, strict=True))
    print(f"The strong form's share of a prediction (512 x 512, one thread): {shares}\n\n{protocol(models, arguments)}")
    if arguments.json:
        figures = {str(candidate) + ", " + candidate.guide: rows for candidate, rows in {**wide, **final}.items()}
        report = {"models": [model.name for model in models], "none": base, "figures": figures, "cost": costs}
        arguments.json.write_text(json.dumps({**report, "protocol": protocol(models, arguments)}, indent=1) + "\n")
    missed = check(final, base, costs) if arguments.check else []
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
