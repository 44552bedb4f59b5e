"""`wsss-evaluate`: any artifact against a split's masks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import track

from wsss_deploy.cli.common import ArgumentParser, run_command
from wsss_deploy.errors import DataError


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "wsss-evaluate", "Per-class IoU, boundary IoU, Dice and mIoU of a model on a split, at native size."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model.pt or model.onnx")
    parser.add_argument("data", type=Path, metavar="DATA", help="data set folder with masks for the split")
    parser.add_argument("--split", required=True, help="name of the split, for example val")
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
    segmenter = Segmenter(arguments.model, device=arguments.device, refine=arguments.refine)
    console = Console(file=sys.stderr)
    progress = iter(track(range(len(names)), "evaluating", console=console, disable=not console.is_terminal))
    result = evaluate(segmenter, source, names, arguments.split, lambda _: next(progress))
    # The bar ends when its iterator does.
    next(progress, None)
    print(json.dumps(result.to_plain()) if arguments.json else result.table())
    return 0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-evaluate`."""
    run_command(_parser(), _evaluate, argv)


if __name__ == "__main__":
    main()
