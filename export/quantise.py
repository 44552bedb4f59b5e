"""Static int8 for CPUs: calibrated on the user's own images, with what does not bear it left in float.

Products with weights and convolutions get 8-bit weights (per channel) and 8-bit activations (one range a tensor, from
the calibration images). Float stay: everything around the attention's scores, norms and softmax, the first convolution,
which sees the image, and the classifier. What more is left in float is a ladder: the gate tries the fastest rung first.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from wsss_deploy.card import ModelCard
from wsss_deploy.errors import ExportError, ImageError
from wsss_deploy.images import load_image
from wsss_deploy.tiling import seen_parts

#: Images that the ranges come from; more take longer and change little.
MOST_IMAGES = 32
#: Windows of an image that is cut into them.
MOST_WINDOWS = 4
#: What stays in float besides the rest, from least to most; see `_left_out`.
LADDER = (
    "the attention and the ends",
    "the attention, the ends and what follows activations",
    "the attention, the ends, what follows activations and the last three quarters of the products",
)
#: Images that are left out of the calibration to be judged on, where there are enough.
HELD_OUT, FEWEST = 8, 8
_LAYERS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = frozenset({"Gelu", "Erf", "Relu", "Sigmoid", "Tanh", "HardSwish"})
_PASSING = frozenset({"Add", "Mul", "Div", "Transpose", "Reshape", "Identity", "Cast"})

_log = logging.getLogger(__name__)


def split_images(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What to calibrate on, and what to judge the result on: every fourth image, which the ranges do not come from.

    Args:
        images: All that are given; fewer than `FEWEST` are used for both.

    Returns:
        At most `MOST_IMAGES`, and at most `HELD_OUT`.
    """
    if len(images) < FEWEST:
        return list(images), list(images)
    held = list(images[::4][:HELD_OUT])
    return [image for image in images if image not in held][:MOST_IMAGES], held


def quantise(proto: onnx.ModelProto, card: ModelCard, images: Sequence[Path], rung: int) -> onnx.ModelProto:
    """A copy of a float32 graph with int8 layers (QuantizeLinear and DequantizeLinear around float operators).

    Args:
        proto: The graph; unchanged.
        card: Its card: the size at which images are seen, and whether in windows.
        images: What to calibrate on; the first `MOST_IMAGES`, which should be like those that will be segmented.
        rung: Number of a step of `LADDER`.

    Raises:
        ExportError: There is no image, or onnxruntime cannot quantise the graph.
        ImageError: An image cannot be used.
    """
    if not images:
        raise ExportError(
            "int8 is calibrated on images like those to be segmented; pass a folder of some with --images"
        )
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    left_out = _left_out(proto, rung)
    _log.info("Calibrating int8 on %d images; in float stay %s", min(len(images), MOST_IMAGES), LADDER[rung])
    level = logging.getLogger().level
    with tempfile.TemporaryDirectory(prefix="wsss-int8-") as scratch:
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        onnx.save(proto, source)
        try:
            logging.getLogger().setLevel(logging.ERROR)  # it advises to pre-process, on the root logger
            quantize_static(
                source,
                target,
                _Reader(card, images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_LAYERS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=left_out,
            )
        except ImageError:
            raise
        except Exception as error:  # of many kinds
            reason = str(error).strip().partition("\n")[0][:200]
            raise ExportError(f"onnxruntime cannot quantise the graph ({reason}); use --precision fp32") from error
        finally:
            logging.getLogger().setLevel(level)
        quantised = onnx.load(target)
    del quantised.graph.value_info[:]
    return quantised


def _left_out(proto: onnx.ModelProto, rung: int) -> list[str]:
    """Names of the layers that stay in float."""
    graph = proto.graph
    weights = {item.name for item in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in _LAYERS]
    convolutions = [node for node in layers if node.op_type == "Conv"]
    last = [node for node in convolutions if any("classify" in name for name in node.input)] or convolutions[-1:]
    left = {node.name for node in layers if not weights & set(node.input)}  # attention
    left |= {node.name for node in (*convolutions[:1], *last)}
    if rung >= 1:
        left |= {node.name for node in layers if _after_activation(node, made_by, weights)}
    if rung >= 2:
        products = [node.name for node in layers if node.op_type != "Conv"]
        left |= set(products[len(products) // 4 :])
    return sorted(left)


def _after_activation(node: onnx.NodeProto, made_by: dict[str, Any], weights: set[str]) -> bool:
    """Whether a layer's input is an activation's result: few large values there spoil the range of all."""
    name = node.input[0]
    for _ in range(8):
        source = made_by.get(name)
        if source is None:
            return False
        if source.op_type in _ACTIVATIONS:
            return True
        if source.op_type not in _PASSING:
            return False
        computed = [item for item in source.input if item not in weights]
        if len(computed) == 0:
            return False
        name = computed[0]
    return False


class _Reader:
    """What the network sees of the calibration images, as onnxruntime asks for it: one at a time."""

    def __init__(self, card: ModelCard, images: Sequence[Path]) -> None:
        self._images = self._read(card, images[:MOST_IMAGES])

    def _read(self, card: ModelCard, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for path in images:
            for seen in seen_parts(load_image(path), card, MOST_WINDOWS):
                yield {"image": np.ascontiguousarray(seen)[None]}

    def get_next(self) -> dict[str, Any] | None:
        return next(self._images, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._images
