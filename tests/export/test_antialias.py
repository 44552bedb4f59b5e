"""Anti-aliased resizing in standard operators: torch's values, and none of it left in exported graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from export.antialias import write_out_antialiased

SIZES = [(14, 14, 30, 40), (14, 14, 7, 5), (14, 9, 14, 9), (5, 8, 5, 20), (3, 3, 1, 1), (40, 33, 13, 90)]


def resize_model(mode, **changes):
    attributes = {
        "mode": mode,
        "antialias": 1,
        "exclude_outside": 1,
        "coordinate_transformation_mode": "half_pixel",
        "cubic_coeff_a": -0.5,
        **changes,
    }
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], name="resize", **attributes)
    graph = helper.make_graph(
        [node],
        "resize",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, "a", "b"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(("mode", "torch_mode"), [("cubic", "bicubic"), ("linear", "bilinear")])
def test_values_are_torchs(mode, torch_mode):
    proto = resize_model(mode)
    assert write_out_antialiased(proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    assert not any(node.op_type == "Resize" for node in proto.graph.node)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for height, width, rows, columns in SIZES:
        torch.manual_seed(0)
        image = torch.randn(1, 3, height, width)
        expected = F.interpolate(image, size=(rows, columns), mode=torch_mode, antialias=True, align_corners=False)
        sizes = np.array([1, 3, rows, columns], np.int64)
        (found,) = session.run(["y"], {"x": image.numpy(), "sizes": sizes})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("changes", [{"antialias": 0}, {"exclude_outside": 0}, {"mode": "nearest"}])
def test_other_resizing_stays(changes):
    proto = resize_model(**{"mode": "cubic", **changes})
    before = proto.SerializeToString()
    assert write_out_antialiased(proto) == 0
    assert proto.SerializeToString() == before


def test_exported_graphs_hold_none(tiny_onnx):
    for node in onnx.load(tiny_onnx).graph.node:
        assert not any(item.name == "antialias" and item.i for item in node.attribute), node.name
