"""`wsss-train`: weak labels in, `model.pt` out."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from training.recipes import packaged_recipes
from wsss_deploy.cli.common import ArgumentParser, Interrupted, run_command, seed_number
from wsss_deploy.errors import TrainingError

if TYPE_CHECKING:
    from training.recipe import Recipe

_log = logging.getLogger(__name__)

# Written out, since their settings cannot be imported without torch, for which `--help` should not wait.
METHODS = ("supervised", "partial_ce", "gated_crf", "dfr", "soft_labels", "tags", "sfc", "tscd")

_EPILOG = """\
Without --recipe the defaults fit the kind of label and the size of the data set. Any value of a recipe can be set
on the command line: --set optimisation.learning_rate=1e-4. The resolved recipe is saved as OUT/recipe.yaml.

examples:
  wsss-train photos --supervision scribbles --out runs/photos
  wsss-train photos --supervision points --weights none --iterations 2000 --out runs/scratch
  wsss-train photos --supervision tags --set method.correspondence_weight=1 --out runs/tags
  wsss-train photos --supervision tags --method tscd --out runs/tscd
  wsss-train photos --out runs/photos --resume
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser("wsss-train", "Train a segmenter from weak labels.", _EPILOG)
    parser.add_argument("data", type=Path, metavar="DATA", help="data set folder (see docs/data.md)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument(
        "--supervision",
        choices=["masks", "scribbles", "points", "tags", "auto"],
        help="kind of label to train from; auto (default) takes the densest labels of pixels that each image has, or "
        "tags where there are no labels of pixels",
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE|NAME",
        help="YAML file, or name of a packaged recipe, whose values replace the defaults; packaged are "
        f"{', '.join(packaged_recipes())}",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one value of the recipe")
    parser.add_argument(
        "--method", metavar="NAME", help=f"short for --set method.name=NAME; one of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--weights", metavar="timm|none|PATH", help="the encoder's start: timm (download), none, or the path of a file"
    )
    parser.add_argument("--encoder", metavar="NAME", help="timm model name")
    parser.add_argument("--iterations", type=int, metavar="N", help="optimiser steps; from tags, of the segmenter")
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="training crop, pixels; the model runs at 1.6 times that (inference_long_side)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step")
    parser.add_argument("--seed", type=seed_number, metavar="N", help="seed of everything random")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to train")
    parser.add_argument("--format", default="auto", choices=["auto", "folder", "voc", "coco"], help="data set layout")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint, with OUT's recipe")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's own options as nested recipe values."""
    values: dict[str, Any] = {}
    targets = {
        "method": ("method", "name"),
        "weights": ("model", "weights"),
        "encoder": ("model", "encoder"),
        "iterations": ("optimisation", "iterations"),
        "batch_size": ("optimisation", "batch_size"),
        "size": ("augmentation", "size"),
        "seed": ("seed",),
        "device": ("device",),
    }
    for option, path in targets.items():
        value = getattr(arguments, option)
        if value is None:
            continue
        place = values
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return values


def _train(arguments: argparse.Namespace) -> int:
    from training.data.dataset import open_dataset

    # Before torch is imported: the commonest mistakes are answered at once.
    source = open_dataset(arguments.data, arguments.format)
    from training.recipe import parse_assignments, read_recipe
    from training.recipes import find_recipe
    from training.run import RECIPE, resolve_recipe, run

    overrides = [read_recipe(find_recipe(arguments.recipe))] if arguments.recipe else []
    before: dict[str, Any] = {}
    if arguments.resume:
        saved = arguments.out / RECIPE
        if not saved.is_file():
            raise TrainingError(f"{arguments.out}: no run to resume ({RECIPE} is missing); leave --resume out to start")
        before = read_recipe(saved)
        overrides.insert(0, before)
    overrides += [_given(arguments), parse_assignments(arguments.set)]
    recipe = resolve_recipe(source, arguments.supervision, overrides, arguments.resume)
    _check_method(before, recipe, arguments.out)
    try:
        result = run(recipe, source, arguments.out, arguments.resume, not arguments.quiet)
    except KeyboardInterrupt as interruption:
        if not _resumable(arguments, recipe):
            raise
        raise Interrupted(f"go on with: {_resume_command(arguments)}") from interruption
    trained = result.trained
    if trained.result is not None:
        print(trained.result.table())
    if result.choice is not None and result.choice.refinement is not None:
        print(
            f"with {result.choice.refinement}, which the model carries and uses unless told otherwise: "
            f"boundary mIoU {result.choice.best.mean_boundary_iou:.4f}, mIoU {result.choice.best.miou:.4f}"
        )
    print(f"{result.model} ({trained.selection}, iteration {trained.iteration}, {trained.seconds:.0f} s of training)")
    print(f"next: wsss-export {result.model}   wsss-predict IMAGE --model {result.model} --out OUT")
    return 0


def _check_method(before: dict[str, Any], recipe: Recipe, out: Path) -> None:
    """See that a run is resumed with its own method; with another, its recipe would be overwritten on the way.

    Classifiers that carry scribbles and points on are the same for all methods that have them, so that a folder
    which holds nothing else may be gone on with by another of these.

    Raises:
        TrainingError: It is another method's run.
    """
    from training.cam_stage import STAGE
    from training.methods.settings import SparseSettings
    from training.state import CHECKPOINT

    saved = before.get("method")
    name = saved.get("name") if isinstance(saved, dict) else None
    if name in (None, recipe.method.name):
        return
    carries = isinstance(recipe.method, SparseSettings) and recipe.method.propagate is not None
    if carries and (out / STAGE / CHECKPOINT).is_file() and not (out / CHECKPOINT).exists():
        return
    raise TrainingError(
        f"{out}: the run there is one of '{name}', this one asks for '{recipe.method.name}'; leave the method out to "
        "resume it, or start a new run with another --out"
    )


def _resumable(arguments: argparse.Namespace, recipe: Recipe) -> bool:
    """Whether --resume would go on with the run that was just stopped.

    Stopped early it has written nothing yet, and the recipe in its folder may be that of an earlier run.
    """
    from training.recipe import dump_recipe
    from training.run import MODEL, RECIPE

    saved: Path = arguments.out / RECIPE
    if not saved.is_file() or (arguments.out / MODEL).exists():
        return False
    return saved.read_text(encoding="utf-8") == dump_recipe(recipe)


def _resume_command(arguments: argparse.Namespace) -> str:
    words = ["wsss-train", str(arguments.data), "--out", str(arguments.out), "--resume"]
    if arguments.format != "auto":
        words += ["--format", arguments.format]  # the one option that the saved recipe does not hold
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-train`."""
    run_command(_parser(), _train, argv)


if __name__ == "__main__":
    main()
