"""`wsss-check`: what a data set holds, and everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress

from training.data.dataset import KINDS, PIXEL_KINDS, counted
from training.data.inspection import Report
from wsss_deploy.cli.common import ArgumentParser, run_command

_EPILOG = """\
Errors make an image or the set unusable; remarks are worth knowing. Exit status 1 when there are errors.
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser("wsss-check", "Count what a data set holds and list every problem.", _EPILOG)
    parser.add_argument("data", type=Path, metavar="DATA", help="data set folder (see docs/data.md)")
    parser.add_argument("--format", default="auto", choices=["auto", "folder", "voc", "coco"], help="data set layout")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def format_report(report: Report) -> str:
    """The report as text: splits, classes per kind, agreement with the masks, problems."""
    lines = [f"{report.name}: {counted(report.images, 'image')}, {len(report.classes)} classes", ""]
    lines += _table(
        ["split", "images", *KINDS],
        [[split, tally.images, *(tally.kinds[kind] for kind in KINDS)] for split, tally in report.splits.items()],
    )
    for kind in KINDS:
        if any(kind in tally.class_images for tally in report.splits.values()):
            lines += ["", *_class_table(report, kind)]
    compared = [
        [kind, split, both, f"{agree / both:.2%}"]
        for kind in KINDS
        for split, tally in report.splits.items()
        for both, agree in [tally.compared.get(kind, (0, 0))]
        if both
    ]
    if compared:
        lines += ["", "agreement with the masks", *_table(["kind", "split", "pixels", "agree"], compared)]
    lines += ["", *_problem_lines(report)]
    return "\n".join(lines)


def _class_table(report: Report, kind: str) -> Iterator[str]:
    splits = {split: tally for split, tally in report.splits.items() if kind in tally.class_images}
    header = [kind]
    for split in splits:
        header += [f"{split} images"] + ([f"{split} pixels"] if kind in PIXEL_KINDS else [])
    rows: list[list[object]] = []
    for index, name in enumerate((*report.classes, "(unlabelled)")):
        row: list[object] = [name]
        for tally in splits.values():
            row.append(tally.class_images[kind][index])
            if kind in PIXEL_KINDS:
                pixels = tally.class_pixels[kind]
                # Masks cover images, so a share says more; sparse labels are counted.
                row.append(f"{pixels[index] / max(sum(pixels), 1):.2%}" if kind == "masks" else pixels[index])
        if name != "(unlabelled)" or kind == "masks":
            rows.append(row)
    return iter(_table(header, rows))


def _problem_lines(report: Report) -> list[str]:
    remarks = len(report.problems) - report.errors
    if not report.problems:
        return ["no problems"]
    lines = [f"{counted(report.errors, 'error')}, {counted(remarks, 'remark')}"]
    return lines + [f"  {problem.severity:<6}  {problem}" for problem in report.problems]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _check(arguments: argparse.Namespace) -> int:
    from training.data.dataset import read_dataset
    from training.data.inspection import inspect

    source = read_dataset(arguments.data, arguments.format)
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(source.image_names))
        report = inspect(source, arguments.data, lambda: progress.advance(task))
    print(json.dumps(report.to_plain(), indent=1) if arguments.json else format_report(report))
    return 1 if report.errors else 0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-check`."""
    run_command(_parser(), _check, argv)


if __name__ == "__main__":
    main()
