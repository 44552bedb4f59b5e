"""wsss-export: a trained model to the files that are deployed."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from wsss_deploy.artifact import read_card
from wsss_deploy.card import ModelCard
from wsss_deploy.cli.common import ArgumentParser, run_command
from wsss_deploy.image_files import find_images


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-export`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-export",
        "Export model.pt and check the result against torch; without agreement nothing is exported.",
        "examples:\n  wsss-export runs/scribbles/model.pt\n  wsss-export model.pt --out deploy --images photos",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model.pt that wsss-train wrote")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="what to write (default: onnx)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: the model's)")
    parser.add_argument(
        "--opset", type=int, choices=range(18, 24), default=20, metavar="N", help="ONNX opset, 18 to 23 (default: 20)"
    )
    parser.add_argument(
        "--refine",
        choices=("none", "in-graph"),
        default="none",
        help="in-graph: the graph refines its scores in any ONNX runtime; none: wsss-deploy's own runtime does, as the "
        "card says, many times faster (default: none)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="pad images to N pixels a side and take no larger ones (default: any size; Swin encoders need one)",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="check on these images, too (the first 8); always checked on made-up ones"
    )
    run_command(parser, _export, argv)


def _export(arguments: argparse.Namespace) -> None:
    images = find_images([arguments.images]) if arguments.images else []
    out: Path = arguments.out or arguments.model.parent
    # Here, not above: torch takes seconds to import, and `--help` and wrong arguments should not wait for it.
    from export.onnx_graph import export_onnx
    from export.parity import REPORT

    path = export_onnx(
        arguments.model,
        out,
        opset=arguments.opset,
        images=images,
        refine=arguments.refine == "in-graph",
        size=arguments.size,
    )
    report = json.loads((path.parent / REPORT).read_text())
    differences = f"differ by {report['score_max']:.1e} at most (allowed {report['thresholds']['score_max']:g})"
    rows = {
        "file": str(path),
        "size": f"{path.stat().st_size / 1e6:.1f} MB, opset {arguments.opset}",
        "probabilities": differences,
        "class ids": f"{report['agreement']:.4%} of the pixels agree in {len(report['cases'])} batches",
        "final masks": f"{report['final_agreement']:.4%} of the pixels agree in {len(report['final'])} images",
        "refinement": _refinement(read_card(path)),
        "ran on": ", ".join(report["providers"]),
        "next": f"wsss-predict IMAGE --model {shlex.quote(str(path))} --out predictions",
    }
    for name, value in rows.items():
        print(f"{name:<15}{value}")


def _refinement(card: ModelCard) -> str:
    if card.refinement is None:
        return "none"
    if card.refinement.in_graph:
        return f"in the graph: {card.refinement}"
    return f"by Segmenter, {'on' if card.refinement.enabled else 'off'} by default: {card.refinement}"


if __name__ == "__main__":
    main()
