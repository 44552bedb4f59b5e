"""Anti-aliased resizing as products with matrices of weights, in standard operators.

timm raises a ViT's position embedding to the image's grid by anti-aliased cubic interpolation. ONNX has an attribute
for it, which runtimes other than ONNX Runtime do not know: TensorRT's parser stops ("Antialiasing is not supported",
NVIDIA/TensorRT issue 3560), OpenVINO gives other values near the border. So the node is written out:
y[i, j] = sum over k, l of W(i, k) V(j, l) x[k, l], where row i of W is the filter around the centre of output i on the
input's grid, widened where the output is smaller, and divided by its sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_HEIGHT, _WIDTH = 2, 3


def write_out_antialiased(proto: onnx.ModelProto) -> int:
    """Replace the graph's `Resize` nodes with `antialias=1` in place.

    Others stay: so do modes and coordinates that torch does not export with anti-aliasing.

    Args:
        proto: The model.

    Returns:
        Number of nodes replaced.
    """
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in proto.graph.node:
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Resize" and given.get("antialias") and _known(node, given):
            nodes.extend(_Writer(f"{node.name or node.output[0]}_written_out", given).nodes_for(node))
            count += 1
        else:
            nodes.append(node)
    if count:
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        del proto.graph.value_info[:]
    return count


def _known(node: onnx.NodeProto, given: dict[str, Any]) -> bool:
    """torch's: linear or cubic, half-pixel centres, weights of what lies outside shared among the rest, to a size."""
    return (
        given.get("mode") in (b"linear", b"cubic")
        and given.get("coordinate_transformation_mode", b"half_pixel") == b"half_pixel"
        and bool(given.get("exclude_outside"))
        and not given.get("axes")
        and len(node.input) == 4
        and bool(node.input[3])
    )


class _Writer:
    """Nodes under construction; methods return the names of their results."""

    def __init__(self, prefix: str, given: dict[str, Any]) -> None:
        self._prefix = prefix
        self._cubic = given["mode"] == b"cubic"
        self._a = float(given.get("cubic_coeff_a", -0.75))
        self._nodes: list[onnx.NodeProto] = []

    def nodes_for(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        source, sizes = node.input[0], node.input[3]
        shape = self._add("Shape", source)
        rows, columns = (self._weights(shape, sizes, axis) for axis in (_HEIGHT, _WIDTH))
        # Products by Einsum, not MatMul: what is written in half precision or int8 elsewhere stays float32 here.
        raised = self._add("Einsum", rows, source, equation="ik,nckl->ncil")
        self._add("Einsum", columns, raised, equation="jl,ncil->ncij", out=node.output[0])
        return self._nodes

    def _weights(self, shape: str, sizes: str, axis: int) -> str:
        """Matrix (output, input) of one axis, float32."""
        number = self._constant(np.array(axis, np.int64))
        given, wanted = (self._add("Gather", values, number, axis=0) for values in (shape, sizes))
        scale = self._add("Div", self._float(given), self._float(wanted))
        centres = self._add("Mul", self._centres(wanted), scale)
        widened = self._add("Max", scale, self._constant(np.float32(1)))
        column = self._add("Unsqueeze", centres, self._constant(np.array([1], np.int64)))
        distance = self._add("Div", self._add("Abs", self._add("Sub", self._centres(given), column)), widened)
        weights = self._cubic_filter(distance) if self._cubic else self._linear_filter(distance)
        total = self._add("ReduceSum", weights, self._constant(np.array([1], np.int64)), keepdims=1)
        return self._add("Div", weights, total)

    def _centres(self, count: str) -> str:
        zero, one = (self._constant(np.array(value, np.int64)) for value in (0, 1))
        return self._add("Add", self._float(self._add("Range", zero, count, one)), self._constant(np.float32(0.5)))

    def _linear_filter(self, distance: str) -> str:
        fallen = self._add("Sub", self._constant(np.float32(1)), distance)
        return self._add("Max", fallen, self._constant(np.float32(0)))

    def _cubic_filter(self, distance: str) -> str:
        """Keys' cubic convolution: ((a + 2) t - (a + 3)) t^2 + 1 up to 1, a (((t - 5) t + 8) t - 4) up to 2."""
        a = self._a
        near = self._polynomial(distance, (a + 2, -(a + 3), 0.0, 1.0))
        far = self._polynomial(distance, (a, -5 * a, 8 * a, -4 * a))
        zero, one, two = (self._constant(np.float32(value)) for value in (0, 1, 2))
        outer = self._add("Where", self._add("Less", distance, two), far, zero)
        return self._add("Where", self._add("Less", distance, one), near, outer)

    def _polynomial(self, variable: str, coefficients: tuple[float, ...]) -> str:
        value = self._constant(np.float32(coefficients[0]))
        for coefficient in coefficients[1:]:
            value = self._add("Mul", value, variable)
            value = self._add("Add", value, self._constant(np.float32(coefficient)))
        return value

    def _float(self, value: str) -> str:
        return self._add("Cast", value, to=TensorProto.FLOAT)

    def _constant(self, value: Any) -> str:
        return self._add("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def _add(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = f"{self._prefix}_{len(self._nodes)}"
        result = out or name
        self._nodes.append(helper.make_node(operator, list(inputs), [result], name=name, **attributes))
        return result
