"""model.onnx to OpenVINO's own files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from wsss_deploy.artifact import read_card
from wsss_deploy.errors import ExportError, UsageError
from wsss_deploy.openvino_file import CARD_ENTRY, WEIGHTS_ENTRY, weights_digest


def load_openvino() -> Any:
    """The module openvino.

    Raises:
        UsageError: It is not installed.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    try:
        import openvino
    except ImportError as error:
        raise UsageError("--format openvino needs OpenVINO; pip install 'wsss-deploy[openvino]'") from error
    return openvino


def build_openvino(onnx_file: Path, target: Path, precision: Literal["fp32", "bf16"]) -> None:
    """Write `model.xml` and `model.bin`. Weights stay float32; bf16 is what OpenVINO computes in.

    Args:
        onnx_file: The exported graph, of precision fp32 and without refinement inside.
        target: The `.xml` to write.
        precision: To run in.

    Raises:
        UsageError: OpenVINO is not installed.
        ExportError: It cannot read the graph.
    """
    openvino = load_openvino()
    card = read_card(onnx_file).model_copy(update={"precision": precision})
    try:
        model = openvino.Core().read_model(str(onnx_file))
        model.set_rt_info(card.to_json(), CARD_ENTRY)
        model.set_rt_info("", WEIGHTS_ENTRY)
        openvino.save_model(model, str(target), compress_to_fp16=False)
        # Known only now; the second writing gives the same weights.
        model.set_rt_info(weights_digest(target), WEIGHTS_ENTRY)
        openvino.save_model(model, str(target), compress_to_fp16=False)
    except Exception as error:  # OpenVINO raises RuntimeError for everything
        reason = str(error).strip().rpartition("\n")[2]
        raise ExportError(f"{onnx_file}: OpenVINO cannot take it ({reason}); export an ONNX file instead") from error
