"""A model whose right answer is known: the class of a pixel is its strongest colour channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsss_deploy.card import Architecture, ModelCard, Preprocessing, Sizing

GAIN = 8.0  # logits per unit of colour


@pytest.fixture(scope="session")
def color_card() -> ModelCard:
    return ModelCard(
        name="colour",
        classes=("red", "green", "blue"),
        palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)),
        architecture=Architecture(encoder="test_vit"),
        preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=16),
        sizing=Sizing(max_long_side=256),
    )


@pytest.fixture
def color_network():
    from torch import nn

    class ColorNetwork(nn.Module):
        def forward(self, image):  # (N, 3, H, W) -> (N, 3, H, W)
            return image * GAIN

    return ColorNetwork()


@pytest.fixture
def color_segmenter(color_network, color_card):
    from wsss_deploy import Segmenter

    return Segmenter.from_network(color_network, color_card)


def color_onnx_bytes(card: ModelCard | None, input_name: str = "image") -> bytes:
    """The same model by the export's contract, written with onnx's helpers; without a card if None."""
    helper = pytest.importorskip("onnx").helper
    from onnx import TensorProto

    constants = [
        helper.make_node("Constant", [], ["gain"], value_float=GAIN / 255),
        helper.make_node("Cast", [input_name], ["bytes_as_float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["bytes_as_float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "gain"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("ArgMax", ["scores"], ["ids"], axis=1, keepdims=0),
        helper.make_node("Cast", ["ids"], ["mask"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        constants,
        "colour",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, ["n", "h", "w", 3])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3, "h", "w"]),
            helper.make_tensor_value_info("mask", TensorProto.UINT8, ["n", "h", "w"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if card is not None:
        helper.set_model_props(model, {"wsss_card": card.to_json()})
    return model.SerializeToString()


@pytest.fixture(scope="session")
def onnx_bytes():
    return color_onnx_bytes


@pytest.fixture(scope="session")
def color_onnx(tmp_path_factory, color_card) -> Path:
    path = tmp_path_factory.mktemp("colour") / "model.onnx"
    path.write_bytes(color_onnx_bytes(color_card))
    return path


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 (40, 60, 3): red left, green right, a blue bottom row; every orientation of it looks different."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30, 0] = 255
    image[:, 30:, 1] = 255
    image[-10:] = (0, 0, 255)
    return image
