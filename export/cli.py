"""wsss-export: a trained model to the files that are deployed."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from export.formats import FORMATS, table
from export.scratch import replace_together, scratch_folder, write_synced
from wsss_deploy.artifact import read_card, report_name
from wsss_deploy.card import ModelCard
from wsss_deploy.cli.common import ArgumentParser, run_command
from wsss_deploy.engine_manifest import manifest_path
from wsss_deploy.errors import ParityError
from wsss_deploy.files import atomic_write
from wsss_deploy.openvino_file import weights_path

if TYPE_CHECKING:
    from export.arguments import Request

_EXAMPLES = """
examples:
  wsss-export runs/scribbles/model.pt
  wsss-export model.pt --out deploy --precision int8 --images photos --data DATA
  wsss-export model.pt --out deploy --format onnx,engine,triton --precision fp16 --refine in-graph"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-export`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-export",
        "Export model.pt and check the result against torch; without agreement nothing is exported.",
        f"{table()}\n{_EXAMPLES}",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model.pt that wsss-train wrote")
    parser.add_argument(
        "--format", default="onnx", metavar="F[,F]", help=f"what to write: {', '.join(f.name for f in FORMATS)}"
    )
    parser.add_argument("--precision", default="fp32", metavar="P", help="fp32, fp16, bf16 or int8 (default: fp32)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: the model's)")
    parser.add_argument(
        "--opset", type=int, choices=range(18, 24), default=20, metavar="N", help="ONNX opset, 18 to 23 (default: 20)"
    )
    parser.add_argument(
        "--refine",
        default="none",
        metavar="R",
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
        "--images",
        metavar="FOLDER",
        help="check on these images, too (8 of them), and calibrate int8 on others (32)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with masks (images/, masks/, splits/): the mIoU must not fall"
    )
    parser.add_argument("--split", help="split of --data (default: val)")
    parser.add_argument(
        "--shapes",
        metavar="MIN/BEST/MAX",
        help="of an engine, each BATCHxHEIGHTxWIDTH (default: 1x1x1, the card's working size, 8 of its largest)",
    )
    triton = parser.add_argument_group("triton")
    triton.add_argument("--name", help="name of the model on the server (default: the card's)")
    triton.add_argument(
        "--max-batch", type=int, metavar="N", help="images put together (default: 8, or the engine's most)"
    )
    triton.add_argument("--instances", type=int, metavar="N", help="copies on each device (default: 1)")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        run_command(parser, _export, argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> NoReturn:
    """End by an exception, so that hidden folders are removed on the way."""
    raise SystemExit(128 + number)


def _export(arguments: argparse.Namespace) -> None:
    # Here and below, not above: onnx and torch take seconds to import, and `--help` should not wait for them.
    from export.arguments import check_arguments

    request = check_arguments(arguments)
    out: Path = arguments.out or arguments.model.parent
    from export.onnx_graph import export_onnx

    path = export_onnx(
        arguments.model,
        out,
        opset=arguments.opset,
        images=request.images,
        refine=arguments.refine == "in-graph",
        size=arguments.size,
        # bf16 is what OpenVINO computes in; the graph that it reads is of float32.
        precision="fp32" if arguments.precision == "bf16" else arguments.precision,
        data=request.data,
    )
    rows = _told(path, f"opset {arguments.opset}")
    served = path
    if "engine" in request.formats:
        served = _engine(arguments, request, path, rows)
    if "openvino" in request.formats:
        file = _openvino(arguments, request, path)
        rows = {"read from": str(path)} | _told(file, "and the weights in its .bin")
    if "triton" in request.formats:
        from export.triton import write_repository

        folder = write_repository(
            served, out / "triton", request.name, max_batch=arguments.max_batch, instances=request.instances
        )
        rows["triton"] = f"{folder}; tritonserver --model-repository {shlex.quote(str(folder.parent))}"
    for name, value in rows.items():
        print(f"{name:<15}{value}")


def _engine(arguments: argparse.Namespace, request: Request, onnx_file: Path, rows: dict[str, str]) -> Path:
    """Build the engine in a hidden folder; it takes its name after it has passed against torch."""
    from export.arguments import engine_command
    from export.tensorrt_engine import build_engine

    target = onnx_file.with_suffix(".engine")
    with scratch_folder(target.parent, ".engine-") as scratch:
        candidate = scratch / target.name
        manifest = build_engine(onnx_file, candidate, request.shapes, engine_command(arguments))
        # TensorFloat-32 may carry products of float32 on a GPU, so an engine is held to half precision's limits.
        report = _prove(arguments, request, candidate, target, "fp16")
        replace_together(report, (manifest_path(candidate), manifest_path(target)), (candidate, target))
    rows["engine"] = f"{target}, TensorRT {manifest.tensorrt} on {manifest.gpu}, {manifest.range_text()}"
    return target


def _told(path: Path, form: str) -> dict[str, str]:
    """What is told of a finished file, from its parity report."""
    report = json.loads((path.parent / report_name(path.name)).read_text())
    rows = {
        "file": str(path),
        "size": f"{path.stat().st_size / 1e6:.1f} MB, {read_card(path).precision}, {form}",
        "probabilities": f"differ by {report['score_max']:.1e} at most (allowed {report['thresholds']['score_max']:g})",
        "class ids": f"{report['agreement']:.4%} of the pixels agree in {len(report['cases'])} batches",
        "final masks": f"{report['final_agreement']:.4%} of the pixels agree in {len(report['final'])} images",
        "refinement": _refinement(read_card(path)),
        "ran on": ", ".join(report["providers"]),
        "next": f"wsss-predict IMAGE --model {shlex.quote(str(path))} --out predictions",
    }
    if report["miou"] is not None:
        rows["mIoU"] = f"{report['miou']['exported']:.4f}, torch {report['miou']['torch']:.4f}"
    return rows


def _openvino(arguments: argparse.Namespace, request: Request, onnx_file: Path) -> Path:
    """Write OpenVINO's files in a hidden folder; they take their names after they have passed against torch."""
    from export.openvino_ir import build_openvino

    target = onnx_file.with_suffix(".xml" if arguments.precision == "fp32" else f".{arguments.precision}.xml")
    with scratch_folder(target.parent, ".openvino-") as scratch:
        candidate = scratch / target.name
        build_openvino(onnx_file, candidate, arguments.precision)
        report = _prove(arguments, request, candidate, target, arguments.precision)
        replace_together(report, (weights_path(candidate), weights_path(target)), (candidate, target))
    return target


def _prove(
    arguments: argparse.Namespace, request: Request, candidate: Path, target: Path, limits: str
) -> tuple[Path, Path]:
    """Compare what is to become `target` with torch; the report beside `candidate`, and the name that it is to take.

    Raises:
        ParityError: It gives other results.
    """
    from export.parity import REPORT_FAILED, THRESHOLDS, check_parity

    report = check_parity(arguments.model, candidate, request.images, THRESHOLDS[limits], request.data)
    if not report.passed:
        with atomic_write(target.parent / REPORT_FAILED) as file:
            file.write(report.to_json().encode())
        raise ParityError(
            f"{target.name}: gives other results than torch: {'; '.join(report.problems[:2])}; it was not kept, the "
            f"figures are in {target.parent / REPORT_FAILED}"
        )
    written = candidate.with_name(report_name(target.name))
    write_synced(written, report.to_json().encode())
    return written, target.with_name(written.name)


def _refinement(card: ModelCard) -> str:
    if card.refinement is None:
        return "none"
    if card.refinement.in_graph:
        return f"in the graph: {card.refinement}"
    return f"by Segmenter, {'on' if card.refinement.enabled else 'off'} by default: {card.refinement}"


if __name__ == "__main__":
    main()
