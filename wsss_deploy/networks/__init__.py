"""The torch modules: encoder, decoder and the network that joins them."""

from __future__ import annotations

from wsss_deploy.networks.decoder import DECODERS
from wsss_deploy.networks.deploy import DeployedNetwork, RefinedNetwork
from wsss_deploy.networks.encoder import Encoder, encoder_preprocessing
from wsss_deploy.networks.network import SegmentationNetwork, build_network, restore_network

__all__ = [
    "DECODERS",
    "DeployedNetwork",
    "Encoder",
    "RefinedNetwork",
    "SegmentationNetwork",
    "build_network",
    "encoder_preprocessing",
    "restore_network",
]
