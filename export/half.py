"""float16 written into an ONNX graph, with what needs the range or the precision kept in float32.

TensorRT 11 builds strongly typed networks only: the types in the file are the types that run. Half are the layers that
carry the cost, convolutions and products with weights, and what only moves or bends their results. Attention scores,
softmax, norms, sums of residual branches, resizing, the guide and the refinement stay float32: left to half precision,
ViT segmenters collapse (NVIDIA/TensorRT issue 4723). Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Half if one input is a weight: the layers themselves.
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
#: Half if all computed inputs are: bias, scale, activation, and moving data.
_FOLLOWING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Gelu", "Erf", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid"}
    | {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather", "Expand", "Flatten"}
    | {"Identity", "MaxPool"}
)
_LARGEST = float(np.finfo(np.float16).max)


def to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a float32 graph in mixed half precision, with the same inputs and outputs.

    Args:
        proto: The graph; unchanged.
    """
    half = onnx.ModelProto()
    half.CopyFrom(proto)
    _Converter(half).convert()
    return half


class _Converter:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._weights = {item.name: item for item in proto.graph.initializer}
        typed = onnx.shape_inference.infer_shapes(proto).graph
        ports = (*typed.value_info, *typed.input, *typed.output)
        self._floats = {port.name for port in ports if port.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._floats |= {name for name, item in self._weights.items() if item.data_type == TensorProto.FLOAT}
        self._constants = set(self._weights)
        self._half: set[str] = set()
        self._casts: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def convert(self) -> None:
        outputs = {port.name for port in self._graph.output}
        for node in self._graph.node:
            if node.op_type == "Constant":
                self._constants.add(node.output[0])
            becomes_half = self._fits(node) and not outputs & set(node.output)
            wanted = TensorProto.FLOAT16 if becomes_half else TensorProto.FLOAT
            for index, name in enumerate(node.input):
                if name in self._floats and (becomes_half or name in self._half):
                    node.input[index] = self._as(name, wanted)
            if becomes_half:
                self._half |= set(node.output) & self._floats
            self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input} | outputs
        kept = [item for item in self._graph.initializer if item.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        del self._graph.value_info[:]

    def _fits(self, node: onnx.NodeProto) -> bool:
        if node.domain or any(name and name not in self._floats for name in node.output):
            return False
        floats = [name for name in node.input if name in self._floats]
        computed = [name for name in floats if name not in self._constants]
        if not self._in_range(name for name in floats if name in self._weights):
            return False
        if node.op_type in _LAYERS:
            return len(computed) < len(floats)  # the product of two computed tensors is an attention's
        if node.op_type not in _FOLLOWING or not computed:
            return False
        residual = node.op_type == "Add" and len(computed) > 1
        return not residual and all(name in self._half for name in computed)

    def _in_range(self, names: Iterable[str]) -> bool:
        arrays = (numpy_helper.to_array(self._weights[name]) for name in names)
        return all(np.abs(array).max(initial=0) <= _LARGEST for array in arrays)

    def _as(self, name: str, kind: int) -> str:
        """Name of a tensor in the type; a cast or a converted weight is added at its first use."""
        is_half = name in self._half
        if is_half == (kind == TensorProto.FLOAT16):
            return name
        if (name, kind) not in self._casts:
            target = f"{name}_as_{'half' if kind == TensorProto.FLOAT16 else 'float'}"
            self._casts[name, kind] = target
            if name in self._weights:
                array = numpy_helper.to_array(self._weights[name]).astype(np.float16)
                self._graph.initializer.append(numpy_helper.from_array(array, target))
            else:
                self._nodes.append(helper.make_node("Cast", [name], [target], name=f"cast_{target}", to=kind))
        return self._casts[name, kind]
