"""wsss-bench: latency, throughput, memory and mIoU of model files, as one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wsss_deploy.artifact import check_path
from wsss_deploy.backends import check_device_name
from wsss_deploy.bench.measure import Case, measure_apart
from wsss_deploy.bench.report import CEILINGS, FLOORS, markdown, read_limits, short_names, violations
from wsss_deploy.card import LARGEST_SIDE
from wsss_deploy.cli.common import MODEL_FILES, ArgumentParser, run_command
from wsss_deploy.environment import describe_environment
from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.files import atomic_write


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-bench`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-bench",
        "Measure model files: latency from an image in memory to its mask, images per second, peak memory, time to "
        "the first mask, what predict adds to the runtime's call, and mIoU. Every case runs in a process of its own.",
        "examples:\n  wsss-bench model.pt model.onnx --size 256 --size 512\n"
        "  wsss-bench model.onnx --data DATA --images 50 --floor miou=0.6 --ceiling p95_ms=300 --json bench.json",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_FILES)
    parser.add_argument("--device", action="append", metavar="D", help="auto, cpu, cuda or cuda:N; may be repeated")
    parser.add_argument(
        "--size",
        action="append",
        type=int,
        metavar="PX",
        help="pixels a side (default: 512); a network of one size runs at its own, which is told",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a call for images/s (default: 1)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed calls of a case (default: 20)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: its own, within what this process may use)"
    )
    parser.add_refinement()
    parser.add_argument("--data", metavar="DIR", help="folder with images/, masks/ and splits/, for the mIoU")
    parser.add_argument("--split", default="val", help="its split (default: val)")
    parser.add_argument("--images", type=int, metavar="N", help="use N images of the split, evenly spread")
    parser.add_argument(
        "--floor", action="append", default=[], metavar="F=X", help=f"exit with 1 below it: {', '.join(FLOORS)}"
    )
    parser.add_argument(
        "--ceiling", action="append", default=[], metavar="F=X", help=f"exit with 1 above it: {', '.join(CEILINGS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table, too")
    run_command(parser, _bench, argv)


def _bench(arguments: argparse.Namespace) -> int:
    floors = read_limits(arguments.floor, FLOORS, "--floor")
    ceilings = read_limits(arguments.ceiling, CEILINGS, "--ceiling")
    cases = _cases(arguments)
    rows: list[dict[str, Any]] = []
    names = short_names(arguments.models)
    for case in cases:
        try:
            row = measure_apart(case)
        except BackendError as error:
            row = {**case.model_dump(), "error": str(error)}
        rows.append(row | {"model": names[case.model]})
    environment = describe_environment()
    table = markdown(rows, environment)
    problems = [row["error"] for row in rows if "error" in row] + violations(rows, floors, ceilings)
    if arguments.json is not None:
        content = {"format": "wsss-bench", "environment": environment, "rows": rows, "problems": problems}
        with atomic_write(arguments.json) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    if arguments.markdown is not None:
        with atomic_write(arguments.markdown) as file:
            file.write(table.encode())
    sys.stdout.write(table)
    for problem in problems:
        sys.stderr.write(f"wsss-bench: {problem}\n")
    return 1 if problems else 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    for option in ("batch", "runs", "threads", "images"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value}: expected at least 1")
    sizes = arguments.size or [512]
    for size in sizes:
        if not 16 <= size <= LARGEST_SIDE:
            raise UsageError(f"--size {size}: expected 16 to {LARGEST_SIDE} pixels")
    devices = arguments.device or ["auto"]
    for device in devices:
        check_device_name(device)
    for model in arguments.models:
        check_path(model)
    names = ("batch", "runs", "threads", "refine", "data", "split", "images")
    common = {name: getattr(arguments, name) for name in names}
    return [
        Case(model=model, device=device, size=size, **common)
        for size in sizes
        for model in arguments.models
        for device in devices
    ]
