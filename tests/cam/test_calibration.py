from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.cam import calibration
from training.cam.attention import AttentionTap
from training.cam.calibration import along_attention, along_correlation, with_prototypes
from training.cam.tokens import TokenCams
from training.methods.tag_settings import CalibrationSettings, TokenSettings
from wsss_deploy.networks.encoder import Encoder

HEIGHT, WIDTH = 4, 6


@pytest.fixture
def halves():
    """Features that point two ways, left and right, and probabilities that are wrong at one position."""
    generator = torch.Generator().manual_seed(0)
    feature = 0.1 * torch.randn(1, 8, HEIGHT, WIDTH, generator=generator)
    feature[:, 0, :, :3] += 1
    feature[:, 0, :, 3:] -= 1
    feature[:, 1, :, 3:] += 1
    maps = torch.full((1, 3, HEIGHT, WIDTH), 0.1)
    maps[:, 0, :, :3], maps[:, 1, :, 3:] = 0.9, 0.9
    maps[:, 2] = 0
    maps[0, :, 1, 1] = torch.tensor([0.3, 0.7, 0.0])
    return maps, feature


def parts(maps, feature):
    generator = torch.Generator().manual_seed(1)
    layers = [
        tuple(torch.randn(1, heads, HEIGHT * WIDTH, 5, generator=generator) for _ in range(2)) for heads in (1, 3)
    ]
    return {
        "attention": along_attention(maps, layers, 0.7, 0.5),
        "correlation": along_correlation(maps, feature, 4.0, 2),
        "prototypes": with_prototypes(maps, feature, 0.5, 1.0),
    }


@pytest.mark.parametrize("part", ["attention", "correlation", "prototypes"])
def test_probabilities_stay_probabilities(halves, part):
    maps, feature = halves
    found = parts(maps, feature)[part]
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, HEIGHT, WIDTH))
    assert (found >= 0).all()
    assert (found[:, 2] == 0).all(), "what an image cannot hold it does not get"


@pytest.mark.parametrize("part", ["attention", "correlation", "prototypes"])
def test_they_are_in_float32_under_autocast_and_in_blocks(halves, part, monkeypatch):
    expected = parts(*halves)[part]
    monkeypatch.setattr(calibration, "_BLOCK", 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = parts(*halves)[part]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["attention", "correlation"])
def test_maps_that_are_the_same_everywhere_stay(halves, part):
    _, feature = halves
    even = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1).expand(1, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(parts(even, feature)[part], even)


@pytest.mark.parametrize("part", ["correlation", "prototypes"])
def test_a_position_follows_those_that_look_alike(halves, part):
    maps, feature = halves
    assert maps[0, :, 1, 1].argmax() == 1
    found = parts(maps, feature)[part]
    assert found[0, :, 1, 1].argmax() == 0
    assert (found[0, 0, :, :3] > found[0, 1, :, :3]).all()
    assert (found[0, 1, :, 3:] > found[0, 0, :, 3:]).all()


def test_attention_is_symmetric_and_shared():
    maps = torch.zeros(1, 2, 1, 3)
    maps[0, 0] = torch.tensor([[1.0, 0.0, 0.0]])
    maps[0, 1] = 1 - maps[0, 0]
    queries = torch.full((1, 1, 3, 3), -40.0)
    queries[0, 0, 0, 1] = queries[0, 0, 1, 1] = queries[0, 0, 2, 2] = 40.0  # the first attends to the second alone
    layers = [(queries, torch.eye(3)[None, None])]
    found = along_attention(maps, layers, 1.0, 0.25)
    # The second takes from the first as the first does from it: one part of three, itself (twice) the rest.
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.75, 0.25 / 3, 0.0]))
    assert along_attention(maps, layers, 1.0, 0.0) is maps


def test_an_image_in_which_a_class_has_no_sure_position_is_left(halves):
    maps, feature = halves
    maps = torch.cat([maps, maps])
    maps[1, 1] *= 0.5
    maps[1, 0] = 1 - maps[1, 1]
    found = with_prototypes(maps, feature.expand(2, -1, -1, -1), 0.5, 1.0)
    assert not torch.equal(found[0], maps[0])
    torch.testing.assert_close(found[1], maps[1])
    assert with_prototypes(maps, feature.expand(2, -1, -1, -1), 0.97, 1.0) is maps, "no prototype at all"


def test_a_position_without_feature_keeps_its_probabilities(halves):
    maps, feature = halves
    feature[..., 2, 2] = 0
    found = along_correlation(maps, feature, 4.0, 2)
    torch.testing.assert_close(found[..., 2, 2], maps[..., 2, 2])
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, HEIGHT, WIDTH))


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0"])
def test_recorded_attention_is_what_the_encoder_computes(name, monkeypatch):
    torch.manual_seed(0)
    encoder = Encoder(name).eval()
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, *a, **o: seen.append((q, k)) or attend(q, k, *a, **o)
    )
    with torch.no_grad(), AttentionTap(encoder) as tap:
        encoder(torch.randn(1, 3, 64, 96))
    assert len(tap.pairs()) == 2
    for (query, key), (used_query, used_key) in zip(tap.pairs(), seen[-2:], strict=True):
        count = query.shape[2]  # without class tokens
        torch.testing.assert_close(query, used_query[:, :, -count:])
        torch.testing.assert_close(key, used_key[:, :, -count:])
        assert tap.scale == pytest.approx(query.shape[3] ** -0.5)


# Attention over channels, in windows, with rotations, in several shapes: none of it is taken for a plain ViT's.
@pytest.mark.parametrize(
    "name",
    ["test_vit", "test_convnext", "pvt_v2_b0", "xcit_nano_12_p16_224", "edgenext_xx_small", "eva02_tiny_patch14_224"],
)
def test_calibrated_cams_of_any_encoder(name):
    torch.manual_seed(0)
    encoder = Encoder(name).eval()
    image = torch.randn(2, 3, 4 * encoder.stride, 6 * encoder.stride)
    tags, found = torch.tensor([[1.0, 0, 1], [0, 0, 0]]), []
    for chosen in (None, CalibrationSettings(), CalibrationSettings(attention=0.0, steps=0, fusion=0.0)):
        settings = TokenSettings(depth=0.75, scales=(1.0, 1.5), calibration=chosen)
        model = TokenCams(settings, encoder, 4)
        torch.manual_seed(1)
        with torch.no_grad():
            model.head.layers[1].weight.normal_()
        found.append(model.cams(encoder, image, tags))
    plain, calibrated, off = found
    torch.testing.assert_close(plain, off)
    assert not torch.allclose(plain, calibrated)
    assert (calibrated[:, 1] == 0).all()
    assert (calibrated[1] == 0).all()
    assert calibrated.min() >= 0
    assert calibrated.sum(dim=1).max() <= 1 + 1e-4


def test_prototypes_can_be_looked_at():
    torch.manual_seed(0)
    encoder = Encoder("test_vit").eval()
    image, tags = torch.randn(1, 3, 64, 96), torch.tensor([[1.0, 0, 1]])
    model = TokenCams(TokenSettings(calibration=CalibrationSettings(seeds=0.0)), encoder, 4)
    torch.nn.init.normal_(model.head.layers[1].weight)
    found = model.prototype_cams(encoder, image, tags)
    assert found.shape == (1, 3, 64, 96)
    assert found.max() > 0
    assert (found[:, 1] == 0).all()
    assert TokenCams(TokenSettings(calibration=None), encoder, 4).prototype_cams(encoder, image, tags) is None
