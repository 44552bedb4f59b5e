"""Checks of a model file that need no runtime: what `wsss-doctor MODEL` tells before it runs the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from wsss_deploy.artifact import check_path, load_model, read_card, report_name
from wsss_deploy.backends import can_run
from wsss_deploy.engine_manifest import read_engine, read_manifest
from wsss_deploy.errors import WsssError
from wsss_deploy.onnx_check import check_onnx
from wsss_deploy.openvino_file import check_weights, weights_path


class Check(NamedTuple):
    """One check of a file.

    Attributes:
        name: What was checked.
        passed: Whether it holds; None where it could not be told.
        detail: One line.
    """

    name: str
    passed: bool | None
    detail: str


def check_file(path: str) -> list[Check]:
    """Check a model file: card, structure, digests, parity report.

    Args:
        path: The file.

    Raises:
        ArtifactError: There is no such file, or it has no readable card.
    """
    model = check_path(path)
    card = read_card(model)
    checks = [Check("card", True, f"{card.name}, {len(card.classes)} classes, {card.precision}")]
    structure = {".onnx": _onnx, ".engine": _engine, ".xml": _openvino, ".pt": _torch}[model.suffix.lower()]
    try:
        checks.append(structure(model))
    except WsssError as error:
        checks.append(Check("content", False, str(error)))
    if model.suffix.lower() == ".engine":
        checks += _graph(model)
    if model.suffix.lower() != ".pt":
        checks.append(_parity(model))
    return checks


def _onnx(model: Path) -> Check:
    check_onnx(model)
    return Check("content", True, "structure, tensors and operators are in order; nothing outside of its folder")


def _engine(model: Path) -> Check:
    manifest = read_manifest(model)
    read_engine(model, manifest)
    built = f"TensorRT {manifest.tensorrt}, {manifest.gpu} ({manifest.compute_capability})"
    plugins = f", plugins {', '.join(manifest.plugins)}" if manifest.plugins else ""
    return Check("content", True, f"is what its manifest speaks of: {built}, {manifest.range_text()}{plugins}")


def _graph(model: Path) -> list[Check]:
    """Whether the ONNX file beside an engine, if there is one, is the one that it was built from."""
    graph = model.with_suffix(".onnx")
    if not graph.is_file():
        return []
    if hashlib.sha256(graph.read_bytes()).hexdigest() == read_manifest(model).onnx_sha256:
        return [Check("graph", True, f"was built from the {graph.name} beside it")]
    return [Check("graph", False, f"was built from another {graph.name} than the one beside it; build it anew")]


def _openvino(model: Path) -> Check:
    check_weights(model)
    return Check("content", True, f"{weights_path(model).name} beside it belongs to it")


def _torch(model: Path) -> Check:
    if not can_run("torch").available:
        return Check("content", None, "card only; its tensors are checked where torch is installed")
    _, state = load_model(model)
    return Check("content", True, f"{len(state)} tensors, {sum(item.numel() for item in state.values()):,} numbers")


def _parity(model: Path) -> Check:
    report = model.with_name(report_name(model.name))
    try:
        content: dict[str, Any] = json.loads(report.read_bytes())
        digest, verdict, agreement = content["model_sha256"], content["verdict"], content["final_agreement"]
    except OSError:
        return Check("parity", None, f"no {report.name} beside it; wsss-export writes one")
    except (ValueError, KeyError, TypeError):
        return Check("parity", False, f"{report.name} is damaged; export again")
    if digest != hashlib.sha256(model.read_bytes()).hexdigest():
        return Check("parity", False, f"{report.name} speaks of another file; export again")
    if verdict not in ("passed", "failed") or not _is_share(agreement):
        return Check("parity", False, f"{report.name} is damaged; export again")
    return Check(
        "parity", verdict == "passed", f"{verdict} against torch, {agreement:.4%} of the pixels agree at least"
    )


def _is_share(value: object) -> bool:
    """Whether a value is a part of a whole; JSON of Python also holds NaN, and a truth value counts as a number."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1
