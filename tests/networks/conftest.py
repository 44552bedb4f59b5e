"""One small timm model of each family that the documents name."""

from __future__ import annotations

import pytest
import torch

from wsss_deploy.card import Architecture
from wsss_deploy.networks import build_network

FAMILIES = {
    "test_vit": {},
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 4},
    "vit_tiny_patch16_dinov3_qkvb": {},
    "deit3_small_patch16_224": {"depth": 4},
    "eva02_tiny_patch14_224": {},
    "pvt_v2_b0": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 2, 1)},
    "tiny_vit_5m_224": {},
    "convnext_atto": {},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture(params=FAMILIES)
def family(request):
    """An architecture of each family, with a narrow decoder."""
    return Architecture(encoder=request.param, decoder_width=16, encoder_options=dict(FAMILIES[request.param]))


@pytest.fixture
def make_network():
    def make(architecture: Architecture, num_classes: int = 5, **arguments):
        torch.manual_seed(0)
        return build_network(architecture, num_classes, **arguments)

    return make
