"""What an export has of operators is what files are allowed to have (`wsss_deploy.onnx_check`)."""

from __future__ import annotations

import onnx
import pytest
import torch

from export import onnx_graph
from export.half import to_half
from export.onnx_graph import build_graph
from export.patterns import pattern_image
from export.quantise import quantise
from wsss_deploy.artifact import load_model
from wsss_deploy.card import Architecture, ModelCard, default_palette
from wsss_deploy.errors import ExportError
from wsss_deploy.networks import build_network, encoder_preprocessing
from wsss_deploy.onnx_check import _WRITTEN, check_onnx

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py

# A model of each family that the documents name, and one of other families for each kind of block.
ENCODERS = {
    "test_vit": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 1},
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 1},
    "deit3_small_patch16_224": {"depth": 1},
    "eva02_tiny_patch14_224": {"depth": 1},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"depths": (2, 1, 1, 1)},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}


def graph_of(encoder, options, opset, decoder="mlp"):
    torch.manual_seed(0)
    architecture = Architecture(encoder=encoder, decoder=decoder, decoder_width=16, encoder_options=options)
    card = ModelCard(
        name="x",
        classes=("a", "b", "c"),
        palette=default_palette(3),
        architecture=architecture,
        preprocessing=encoder_preprocessing(encoder, options),
    )
    return card, build_graph(card, build_network(architecture, 3).state_dict(), opset, "model.pt")


def operators(proto):
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    return {node.op_type for node in nodes if node.domain == ""}


def check(proto, path):
    onnx.save(proto, path)
    check_onnx(path)
    assert operators(proto) <= set(_WRITTEN.split())


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "opset"), [*zip(ENCODERS, (18, 23) * len(ENCODERS), strict=False)])
def test_every_family(encoder, opset, tmp_path, one_thread):
    # Half of them at each end of the opsets; that takes half the time, and every export checks its own graph.
    check(graph_of(encoder, ENCODERS[encoder], opset)[1], tmp_path / "model.onnx")


@pytest.mark.parametrize("decoder", ["light", "upernet"])
def test_every_decoder_and_precision(decoder, tmp_path, one_thread):
    from PIL import Image

    card, proto = graph_of("pvt_v2_b0", ENCODERS["pvt_v2_b0"], 20, decoder)
    Image.fromarray(pattern_image(64, 64, 0)).save(tmp_path / "0.png")
    for form in (proto, to_half(proto), quantise(proto, card, [tmp_path / "0.png"], 0)):
        check(form, tmp_path / "model.onnx")


@pytest.mark.parametrize("where", ["graph", "function"])
def test_an_operator_outside_of_the_list_fails_the_export(tiny_model, tiny_onnx, monkeypatch, where):
    card, state = load_model(tiny_model)
    traced = onnx.load(tiny_onnx)
    node = onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[1])
    if where == "graph":
        traced.graph.node.append(node)
    else:
        opsets = [onnx.helper.make_opsetid("", 20)]
        traced.opset_import.append(onnx.helper.make_opsetid("wsss", 1))
        traced.functions.append(onnx.helper.make_function("wsss", "Noise", [], ["noise"], [node], opsets))
        traced.graph.node.append(onnx.helper.make_node("Noise", [], ["noise"], domain="wsss"))
    monkeypatch.setattr(onnx_graph, "_trace", lambda *_: traced)
    told = f"model.pt: encoder '{card.architecture.encoder}' needs the operator 'RandomNormal', which Segmenter refuses"
    with pytest.raises(ExportError, match=told):
        build_graph(card, state, 20, "model.pt")
