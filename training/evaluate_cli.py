"""`wsss-evaluate`: any artifact against a split's masks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import track

from wsss_deploy.cli.common import MODEL_FILES, ArgumentParser, run_command
from wsss_deploy.errors import DataError, UsageError

if TYPE_CHECKING:
    from training.data.dataset import DataSource


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "wsss-evaluate", "Per-class IoU, boundary IoU, Dice and mIoU of a model on a split, at native size."
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help=f"{MODEL_FILES}; with --first-stage the folder of a run"
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="data set folder with masks for the split")
    parser.add_argument("--split", required=True, help="name of the split, for example val")
    parser.add_argument(
        "--first-stage",
        action="store_true",
        help="instead of a model, what a run from image tags made on its way: class activation maps (with the images' "
        "tags, without refinement, at the background score that is best on these very images) and pseudo-labels; of "
        "one from points or scribbles that carried labels on, these",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_refinement()
    parser.add_argument("--format", default="auto", choices=["auto", "folder", "voc", "coco"], help="data set layout")
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    from training.data.dataset import open_dataset
    from training.evaluate import evaluate
    from training.run import split_names
    from wsss_deploy import Segmenter

    source = open_dataset(arguments.data, arguments.format)
    names = [name for name in split_names(source, arguments.split) if "masks" in source.kinds(name)]
    if not names:
        raise DataError(f"{source.name}: no image of split '{arguments.split}' has a mask; evaluation needs masks")
    if arguments.first_stage:
        if arguments.refine is not None:
            raise UsageError(
                "--first-stage scores what a run made before its model; leave out --refine and --no-refine"
            )
        found = _first_stage(arguments.model, source, names, arguments.device)
        # Where no pixel is sure there is no mIoU, which JSON calls null.
        plain = {kind: row | ({} if math.isfinite(row["miou"]) else {"miou": None}) for kind, row in found.items()}
        print(json.dumps(plain) if arguments.json else _told(found))
        return 0
    segmenter = Segmenter(arguments.model, device=arguments.device, refine=arguments.refine)
    console = Console(file=sys.stderr)
    progress = iter(track(range(len(names)), "evaluating", console=console, disable=not console.is_terminal))
    result = evaluate(segmenter, source, names, arguments.split, lambda _: next(progress))
    # The bar ends when its iterator does.
    next(progress, None)
    print(json.dumps(result.to_plain()) if arguments.json else result.table())
    return 0


def _first_stage(folder: Path, source: DataSource, names: Sequence[str], device: str) -> dict[str, dict[str, float]]:
    from training.cam.pseudo_labels import PseudoLabelSource
    from training.cam.scoring import score_cams, score_labels, score_made_labels
    from training.cam_stage import LABELS
    from training.methods.tag_settings import TagsSettings, TSCDSettings
    from training.recipe import build_recipe, read_recipe
    from training.run import RECIPE, prepare_source

    path = folder / RECIPE
    recipe = build_recipe(read_recipe(path), str(path)) if path.is_file() else None
    method = None if recipe is None else recipe.method
    from_tags = isinstance(method, TagsSettings | TSCDSettings)
    made = any((folder / LABELS).glob("*.png"))
    if recipe is None or not (made or from_tags):
        raise DataError(
            f"{folder} holds no {RECIPE} with {LABELS}/: --first-stage takes the folder (--out) of a training from "
            "tags, or of one that carried labels on (propagate)"
        )
    if recipe.supervision in ("auto", "masks") and not from_tags:
        raise DataError(f"{folder}: its labels of images with masks are these masks; there is nothing to compare")
    source, _ = prepare_source(source, recipe)  # tags may have been simulated
    found = {}
    tagged = [name for name in names if source.tags(name) is not None]
    if tagged and from_tags:
        found["class activation maps"] = score_cams(source, recipe, folder, tagged, device)
    labels = PseudoLabelSource(source, folder / LABELS)
    if labelled := [name for name in names if labels.path(name).is_file()]:  # training images alone have one
        found["pseudo-labels"] = score_labels(source, folder / LABELS, labelled)
    elif tagged and isinstance(method, TSCDSettings):
        found["pseudo-labels"] = score_made_labels(source, recipe, folder, tagged, device)
    if not found:
        raise DataError(f"{source.name}: no image with a mask has tags or a pseudo-label; is the split the right one?")
    return found


def _told(found: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, row in found.items():
        extra = f"background {row['background']}" if "background" in row else f"{100 * row['sure']:.1f} % of pixels"
        lines.append(f"{name}: mIoU {row['miou']:.4f} ({extra}, {row['images']} images)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-evaluate`."""
    run_command(_parser(), _evaluate, argv)


if __name__ == "__main__":
    main()
