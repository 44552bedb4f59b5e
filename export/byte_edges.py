"""Bytes at the edges of the graph only: `image` feeds one cast to float, and `mask` comes of a cast from float.

TensorRT takes uint8 for inputs and outputs and for the casts beside them, and refuses it in all other layers, also in
those that only move data or read a shape (NVIDIA/TensorRT issue 3985; its table of types converts uint8 from and to
floats alone). torch exports padding and shapes on the bytes themselves, and the mask as a cast from int64.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def cast_bytes_at_the_edges(proto: onnx.ModelProto) -> None:
    """Move the casts of a traced graph to its input and outputs, in place.

    Args:
        proto: Its inputs and outputs that are uint8 are meant; nodes between them that took or gave uint8 take and
            give float32 then, which holds every byte.
    """
    graph = proto.graph
    bytes_in = [port.name for port in graph.input if port.type.tensor_type.elem_type == TensorProto.UINT8]
    bytes_out = {port.name for port in graph.output if port.type.tensor_type.elem_type == TensorProto.UINT8}
    as_float = {name: f"{name}_as_float" for name in bytes_in}
    nodes = [
        helper.make_node("Cast", [name], [target], name=f"cast_{target}", to=TensorProto.FLOAT)
        for name, target in as_float.items()
    ]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = as_float.get(name, name)
        if node.op_type == "Cast" and node.output[0] in bytes_out:
            target = f"{node.output[0]}_as_float"
            nodes.append(
                helper.make_node("Cast", [node.input[0]], [target], name=f"cast_{target}", to=TensorProto.FLOAT)
            )
            node.input[0] = target
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    # What was inferred of the tensors between is not true any more.
    del graph.value_info[:]
