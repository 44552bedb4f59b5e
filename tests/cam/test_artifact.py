"""Class activation maps as a model file: what comes back is what the classifier says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.cam.artifact import save_cams
from training.cam.head import CamHead, encode
from training.cam.prototypes import SharedFeatureHead
from training.cam.tokens import OddsHead
from wsss_deploy import Segmenter
from wsss_deploy.activation import CAMS, activation_maps
from wsss_deploy.artifact import load_model
from wsss_deploy.card import Architecture, ModelCard, Sizing
from wsss_deploy.networks import build_network, encoder_preprocessing, restore_network

CLASSES = ("background", "red", "green")


def network_and_card(encoder):
    architecture = Architecture(encoder=encoder, decoder="mlp", decoder_width=32)
    torch.manual_seed(0)
    network = build_network(architecture, len(CLASSES)).eval()
    card = ModelCard(
        name="tiny", classes=CLASSES, palette=((0, 0, 0), (200, 0, 0), (0, 200, 0)), architecture=architecture,
        preprocessing=encoder_preprocessing(encoder, {}), sizing=Sizing(long_side=64),
    )  # fmt: skip
    return network, card


def recovered(path, image):
    """Maps from softmax scores of the file's network."""
    card, state = load_model(path)
    scores = restore_network(card, state, "cams")(image).softmax(dim=1)
    maps = activation_maps(scores[0].numpy())
    assert (maps[0] == 0).all()
    return torch.from_numpy(maps)[None, 1:]


@pytest.mark.parametrize(("encoder", "depth"), [("test_vit", 1.0), ("test_vit", 0.5), ("test_convnext", 1.0)])
@torch.no_grad()
def test_the_file_gives_the_classifiers_maps(encoder, depth, tmp_path):
    network, card = network_and_card(encoder)
    head = CamHead(network.encoder, 2, (0.5, 1.0), pooling=1.0).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert save_cams(tmp_path / CAMS, card, network.encoder, head, depth)
    image = torch.randn(1, 3, 64, 96)
    index = head.cam_index(network.encoder, depth)
    normalise, classifier = head.classify[head.indices.index(index)]
    features = normalise(encode(network.encoder, image, [index])[index]) - normalise.bias[:, None, None]
    maps = F.conv2d(features, classifier.weight).relu()
    expected = F.interpolate(maps, size=(16, 24), mode="bilinear", align_corners=False)
    assert expected.amax() > 0.1
    torch.testing.assert_close(recovered(tmp_path / CAMS, image), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_odds_keep_their_offset(tmp_path):
    network, card = network_and_card("test_vit")
    head = OddsHead(network.encoder, 2, 0.5, pooling=0.1).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert save_cams(tmp_path / CAMS, card, network.encoder, head, 0.5)
    image = torch.randn(1, 3, 64, 96)
    (index,) = head.indices
    odds = head(encode(network.encoder, image, [index]))[index]
    expected = F.interpolate(odds.relu(), size=(16, 24), mode="bilinear", align_corners=False)
    assert expected.amax() > 0.1
    torch.testing.assert_close(recovered(tmp_path / CAMS, image), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_shared_features_leave_the_feature_as_it_is(tmp_path):
    network, card = network_and_card("test_vit")
    head = SharedFeatureHead(network.encoder.channels, 2, (8, 8, 8, 8))
    assert save_cams(tmp_path / CAMS, card, network.encoder, head, 1.0)
    image = torch.randn(1, 3, 64, 64)
    maps = head.classifier(network.encoder(image)[-1]).relu()
    expected = F.interpolate(maps, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(recovered(tmp_path / CAMS, image), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stage_that_nothing_can_be_cut_behind_is_not_written(tmp_path):
    network, card = network_and_card("test_convnext")
    head = CamHead(network.encoder, 2, (0.5,), pooling=1.0)
    assert not save_cams(tmp_path / CAMS, card, network.encoder, head, 0.5)
    assert not (tmp_path / CAMS).exists()


def test_it_opens_like_any_model(tmp_path):
    network, card = network_and_card("test_vit")
    save_cams(tmp_path / CAMS, card, network.encoder, CamHead(network.encoder, 2, (1.0,), pooling=1.0), 1.0)
    segmenter = Segmenter(tmp_path / CAMS)
    assert segmenter.card.name == "tiny-cams"
    result = segmenter.predict(np.zeros((40, 60, 3), np.uint8))
    assert result.mask.shape == (40, 60)
    assert (result.mask == 0).all()  # a classifier that has learned nothing sees nothing


def test_odds_of_more_classes_than_channels_are_not_written(tmp_path):
    network, card = network_and_card("test_vit")
    head = OddsHead(network.encoder, 65, 1.0, pooling=0.1)
    assert not save_cams(tmp_path / CAMS, card, network.encoder, head, 1.0)
