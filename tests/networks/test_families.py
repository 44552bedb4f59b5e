"""What must hold for every encoder family."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from wsss_deploy.card import Architecture
from wsss_deploy.networks import DeployedNetwork, build_network, encoder_preprocessing


def test_trains_at_several_sizes(family, make_network):
    network = make_network(family, drop_path=0.1).train()
    stride = network.stride
    assert stride == encoder_preprocessing(family.encoder, family.encoder_options).stride
    for height, width in ((stride, stride), (3 * stride, 2 * stride)):
        image = torch.randn(2, 3, height, width)
        features = network.forward_features(image)
        assert [tuple(level.shape[1:]) for level in features] == [
            (channels, height // reduction, width // reduction)
            for channels, reduction in zip(network.encoder.channels, network.encoder.reductions, strict=True)
        ]
        logits = network(image)
        assert logits.shape == (2, 5, height // 4, width // 4)
    F.cross_entropy(logits, torch.randint(0, 5, logits[:, 0].shape)).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without, "parameters that nothing uses would be saved, exported and averaged for nothing"
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_state_survives_rebuilding(family, make_network):
    network = make_network(family).eval()
    again = build_network(family, 5).eval()
    image = torch.randn(1, 3, 2 * network.stride, 3 * network.stride)
    with torch.no_grad():
        assert not torch.allclose(again(image), network(image), atol=1e-3)
        again.load_state_dict(network.state_dict(), strict=True)
        torch.testing.assert_close(again(image), network(image))


def test_encoder_sees_the_whole_image(family, make_network):
    """Far pixels matter to the coarsest map: the wiring feeds real features, in the right order."""
    network = make_network(family).eval()
    image = torch.randn(1, 3, 2 * network.stride, 2 * network.stride)
    other = image.clone()
    other[..., -8:, -8:] += 3.0
    with torch.no_grad():
        before, after = network.forward_features(image)[-1], network.forward_features(other)[-1]
    assert (before - after).abs().max() > 1e-3
    assert list(network.encoder.reductions) == sorted(network.encoder.reductions)


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0", "eva02_tiny_patch14_224"])
def test_deployed_takes_any_size(name, make_network):
    network = make_network(Architecture(encoder=name, decoder_width=16)).eval()
    deployed = DeployedNetwork(network, encoder_preprocessing(name, {}))
    with torch.no_grad():
        for shape in ((1, 1, 1, 3), (2, 7, 90, 3), (1, 33, 31, 3)):
            scores, mask = deployed(torch.randint(0, 256, shape, dtype=torch.uint8))
            assert scores.shape == (shape[0], 5, *shape[1:3])
            assert scores.dtype == torch.float32
            assert mask.shape == shape[:3]
            assert mask.dtype == torch.uint8
            torch.testing.assert_close(scores.sum(dim=1), torch.ones(shape[:3]))
            assert torch.equal(mask.long(), scores.argmax(dim=1))
