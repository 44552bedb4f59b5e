"""Small models of several families, exported once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from export.onnx_graph import export_onnx
from wsss_deploy.artifact import save_model
from wsss_deploy.card import Architecture, ModelCard, Sizing, default_palette
from wsss_deploy.networks import build_network, encoder_preprocessing

# One block a stage: the tracer's time goes by the number of operations, not by the width.
OPTIONS = {"pvt_v2_b0": {"depths": (1, 1, 1, 1)}, "convnext_atto": {"depths": (1, 1, 1, 1)}}
# The second block of the first stage shifts its windows.
OPTIONS["swin_tiny_patch4_window7_224"] = {"depths": (2, 1, 1, 1)}
DECODERS = {"pvt_v2_b0": "mlp", "convnext_atto": "light", "test_vit": "mlp"}


def write_model(path: Path, encoder: str) -> Path:
    """A `model.pt` with random weights and scores that differ clearly between classes."""
    torch.manual_seed(0)
    options = OPTIONS.get(encoder, {})
    decoder = DECODERS.get(encoder, "light")
    architecture = Architecture(encoder=encoder, decoder=decoder, decoder_width=16, encoder_options=options)
    network = build_network(architecture, 5)
    for name, parameter in network.decoder.classify.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter)  # one of them starts at zero and would hide its branch
    card = ModelCard(
        name=encoder,
        classes=("background", "sky", "road", "tree", "car"),
        palette=default_palette(5),
        architecture=architecture,
        preprocessing=encoder_preprocessing(encoder, options),
        sizing=Sizing(long_side=96),
    )
    save_model(path, card, network.state_dict())
    return path


@pytest.fixture(scope="session")
def write():
    return write_model


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """One run of the command as a user starts it, in the model's folder."""
    folder = tmp_path_factory.mktemp("test_vit_20")
    write_model(folder / "model.pt", "test_vit")
    line = [sys.executable, "-m", "export.cli", str(folder / "model.pt")]
    return folder, subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, command):
    """Call with an encoder and an opset; gives the folder with model.pt, model.onnx and parity.json."""
    folder, done = command
    assert done.returncode == 0, done.stderr
    ready: dict[tuple[str, int], Path] = {("test_vit", 20): folder}

    def get(encoder: str = "test_vit", opset: int = 20) -> Path:
        if (encoder, opset) not in ready:
            folder = tmp_path_factory.mktemp(f"{encoder}_{opset}")
            export_onnx(write_model(folder / "model.pt", encoder), folder, opset=opset)
            ready[encoder, opset] = folder
        return ready[encoder, opset]

    return get


def _bytes_within(proto):
    """Operators that take or give uint8, but for casts from the image and to the mask."""
    typed = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    kinds = {port.name: port.type.tensor_type.elem_type for port in (*typed.value_info, *typed.input, *typed.output)}
    found = []
    for node in proto.graph.node:
        edges = {name: kinds.get(name) for name in (*node.input, *node.output)}
        if TensorProto.UINT8 not in edges.values():
            continue
        (source, *_), (target, *_) = node.input, node.output
        other = kinds.get(target if source == "image" else source)
        at_an_edge = node.op_type == "Cast" and (source == "image" or target == "mask")
        if not at_an_edge or other not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            found.append(f"{node.op_type} {edges}")
    return found


@pytest.fixture(scope="session")
def bytes_within():
    return _bytes_within
