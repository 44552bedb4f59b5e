"""What can be exported: one table, shown by `wsss-export --help` and in docs/export.md; arguments are checked by it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from wsss_deploy.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: Of `--format`.
        writes: What is written.
        precisions: Of `--precision`.
        devices: Where it runs.
        refinements: Of `--refine`.
        shapes: Which sizes it takes.
        needs: What has to be installed to export it.
    """

    name: str
    writes: str
    precisions: tuple[str, ...]
    devices: str
    refinements: tuple[str, ...]
    shapes: str
    needs: str


FORMATS = (
    Format(
        *("onnx", "model.onnx, model.fp16.onnx, model.int8.onnx", ("fp32", "fp16", "int8"), "CPU, NVIDIA"),
        *(("none", "in-graph"), "any, or one with --size", "[export]; int8: --images"),
    ),
    Format(
        *("engine", "model.engine with its manifest", ("fp32", "fp16"), "NVIDIA, the exporting machine's GPU"),
        *(("none", "in-graph"), "--shapes min/opt/max", "[export,tensorrt], a GPU"),
    ),
    Format(
        *("openvino", "model.xml, model.bf16.xml with their .bin", ("fp32", "bf16"), "CPU"),
        *(("none",), "any, or one with --size", "[export,openvino]"),
    ),
    Format(
        *("triton", "a model repository, around ONNX or an engine", ("fp32", "fp16", "int8"), "CPU, NVIDIA"),
        *(("none", "in-graph"), "as onnx", "[export]; int8: --images"),
    ),
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_NEAREST = {"fp32": ("fp32",), "fp16": ("bf16", "fp32"), "bf16": ("fp16", "fp32"), "int8": ("fp16", "bf16", "fp32")}


def table() -> str:
    """The table as Markdown."""
    rows = [("format", "writes", "precision", "device", "refinement", "shapes", "needs")]
    rows += [
        (f.name, f.writes, ", ".join(f.precisions), f.devices, ", ".join(f.refinements), f.shapes, f.needs)
        for f in FORMATS
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def read_formats(text: str) -> tuple[Format, ...]:
    """Read the comma-separated value of `--format`.

    Args:
        text: What the user gave.

    Raises:
        UsageError: A name is unknown; the message has the nearest one.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = {item.name: item for item in FORMATS}
    for name in names:
        if name not in known:
            raise UsageError(_nearest("--format", name, tuple(known)))
    if not names:
        raise UsageError(f"--format: expected one or more of {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def check(formats: Sequence[Format], precision: str, refine: str, has_images: bool) -> None:
    """Check a combination against the table.

    Args:
        formats: What is to be written.
        precision: Of `--precision`.
        refine: Of `--refine`.
        has_images: Whether `--images` was given.

    Raises:
        UsageError: The table has no such row; the message has the nearest one that it has.
    """
    if precision not in PRECISIONS:
        raise UsageError(_nearest("--precision", precision, PRECISIONS))
    for item in formats:
        if precision not in item.precisions:
            nearest = next((other for other in _NEAREST[precision] if other in item.precisions), item.precisions[0])
            raise UsageError(
                f"--format {item.name} has no --precision {precision}; nearest is --precision {nearest}, or "
                f"--format {' or '.join(other.name for other in FORMATS if precision in other.precisions)}"
            )
        if refine not in item.refinements:
            if refine in ("none", "in-graph"):
                raise UsageError(
                    f"--format {item.name} has no --refine {refine}: wsss-deploy's runtime refines its scores; leave "
                    "--refine out"
                )
            raise UsageError(_nearest(f"--format {item.name} --refine", refine, item.refinements))
    if precision == "int8" and not has_images:
        raise UsageError("--precision int8 is calibrated on images; add --images FOLDER, or take --precision fp16")


def _nearest(option: str, given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? Known" if near else "known"
    return f"{option} {given}: no such choice; {hint} are {', '.join(known)}"
