"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The folder with real data, vectors and weights: WSSS_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("WSSS_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs the shared folder (real data, vectors, weights): set WSSS_SHARED to its path")
    return folder


@pytest.fixture(scope="session")
def tiny_card():
    from wsss_deploy.card import Architecture, ModelCard, default_palette
    from wsss_deploy.networks import encoder_preprocessing

    classes = ("background", "circle", "square", "star")
    return ModelCard(
        name="tiny",
        classes=classes,
        palette=default_palette(len(classes)),
        architecture=Architecture(encoder="test_vit", decoder_width=16),
        preprocessing=encoder_preprocessing("test_vit", {}),
    )


@pytest.fixture(scope="session")
def tiny_network(tiny_card):
    import torch

    from wsss_deploy.networks import build_network

    torch.manual_seed(0)
    return build_network(tiny_card.architecture, len(tiny_card.classes)).eval()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_card, tiny_network) -> Path:
    from wsss_deploy.artifact import save_model

    path = tmp_path_factory.mktemp("tiny") / "model.pt"
    save_model(path, tiny_card, tiny_network.state_dict())
    return path


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model) -> Path:
    from export.onnx_graph import export_onnx

    return export_onnx(tiny_model, tiny_model.parent)
