"""Encoder, decoder and deployed form in detail."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from wsss_deploy.artifact import load_model
from wsss_deploy.card import Architecture
from wsss_deploy.errors import ArtifactError, RecipeError, WsssError
from wsss_deploy.networks import (
    DeployedNetwork,
    SegmentationNetwork,
    build_network,
    encoder_preprocessing,
    restore_network,
)
from wsss_deploy.networks.decoder import DECODERS, LightDecoder, MLPDecoder


def test_plain_vit_levels_are_the_quarters_of_the_depth(make_network):
    network = make_network(Architecture(encoder="vit_tiny_patch16_224", decoder_width=16)).eval()
    assert network.encoder.indices == [2, 5, 8, 11]
    image = torch.randn(1, 3, 32, 48)
    seen = []
    network.encoder.model.blocks[5].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        maps = network.forward_features(image)
    tokens = seen[0][:, 1:]  # without the class token
    torch.testing.assert_close(maps[1], tokens.reshape(1, 2, 3, 192).permute(0, 3, 1, 2))


def test_sizes_that_do_not_fit_are_refused_with_the_remedy(make_network):
    network = make_network(Architecture(encoder="test_vit", decoder_width=16))
    with pytest.raises(ValueError, match="33 x 40, not multiples of 16; pad it to 48 x 48"):
        network(torch.zeros(1, 3, 33, 40))


def test_normalisation_and_padding_are_the_cards(make_network):
    preprocessing = encoder_preprocessing("vit_tiny_patch16_224", {})
    assert preprocessing.mean == (0.5, 0.5, 0.5)
    assert encoder_preprocessing("pvt_v2_b0", {}).mean == (0.485, 0.456, 0.406)

    class Recorder(nn.Module):
        def forward(self, image):
            self.image = image
            return torch.zeros(image.shape[0], 3, image.shape[2] // 4, image.shape[3] // 4)

    recorder = Recorder()
    image = torch.randint(0, 256, (2, 17, 30, 3), dtype=torch.uint8)
    DeployedNetwork(recorder, preprocessing)(image)
    padded = np.pad(image.numpy(), ((0, 0), (0, 15), (0, 2), (0, 0)), mode="edge")
    expected = (padded / 255.0 - 0.5) / 0.5
    np.testing.assert_allclose(recorder.image.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"upernet"}))  # that one sees the whole image
def test_decoder_does_not_depend_on_the_position_or_the_rest_of_the_batch(name):
    torch.manual_seed(0)
    decoder = DECODERS[name]((8, 8), (16, 16), 16, 4).train()  # a BatchNorm would show here
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)  # what starts at zero would hide a dependence
    image, maps = torch.randn(2, 3, 128, 128), [torch.randn(2, 8, 8, 8) for _ in range(2)]
    whole = decoder(image, maps)
    torch.testing.assert_close(decoder(image[1:], [level[1:] for level in maps]), whole[1:])
    tile = decoder(image[..., 32:, 32:], [level[..., 2:, 2:] for level in maps])
    inner = slice(12, None)  # three coarse pixels from the cut
    torch.testing.assert_close(tile[..., inner, inner], whole[..., 8 + 12 :, 8 + 12 :], atol=1e-5, rtol=1e-4)


def test_detail_branch_sees_what_the_maps_do_not():
    torch.manual_seed(0)
    decoder = LightDecoder((8,), (16,), 16, 4)
    maps, image = [torch.randn(1, 8, 2, 2)], torch.zeros(1, 3, 32, 32)
    edge = image.clone()
    edge[..., 16:] = 1.0
    change = (decoder(edge, maps) - decoder(image, maps)).abs().amax(dim=1)[0]
    assert change[:, 5:].max() > 1e-3
    assert change[:, 0].max() < 1e-6  # and only nearby


def test_the_mlp_decoders_correction_starts_at_nothing_and_learns():
    torch.manual_seed(0)
    decoder = MLPDecoder((8, 12), (8, 16), 16, 4)
    image, maps = torch.randn(1, 3, 32, 32), [torch.randn(1, 8, 4, 4), torch.randn(1, 12, 2, 2)]
    logits = decoder(image, maps)
    assert logits.shape == (1, 4, 8, 8)
    torch.testing.assert_close(logits, decoder(torch.randn(1, 3, 32, 32), maps))
    logits.square().sum().backward()
    assert decoder.classify["fine"].weight.grad.abs().max() > 0
    with torch.no_grad():
        decoder.classify["fine"].weight.normal_()
    assert not torch.allclose(decoder(image, maps), decoder(-image, maps))


def test_decoder_is_cheap_beside_the_smallest_vit(make_network):
    network = make_network(Architecture(encoder="vit_tiny_patch16_224"), 21)
    image = torch.randn(2, 3, 256, 256)
    best = {"encoder": float("inf"), "decoder": float("inf")}
    for _ in range(3):
        start = time.perf_counter()
        features = network.forward_features(image)
        sum(level.sum() for level in features).backward()
        middle = time.perf_counter()
        network.decoder(image, [level.detach().requires_grad_() for level in features]).sum().backward()
        best["encoder"] = min(best["encoder"], middle - start)
        best["decoder"] = min(best["decoder"], time.perf_counter() - middle)
    assert best["decoder"] < 0.5 * best["encoder"]


def test_unknown_names_and_options_are_told_with_the_nearest():
    with pytest.raises(RecipeError, match=r"'vit_tiny_patch16_22' is no model of timm .*vit_tiny_patch16_224"):
        build_network(Architecture(encoder="vit_tiny_patch16_22"), 3)
    with pytest.raises(RecipeError, match=r"'heavy' is not known; choose one of: mlp, light, upernet"):
        build_network(Architecture(encoder="test_vit", decoder="heavy"), 3)
    with pytest.raises(RecipeError, match=r"does not take.*colour.*correct encoder_options"):
        build_network(Architecture(encoder="test_vit", encoder_options={"colour": 1}), 3)
    with pytest.raises(RecipeError, match="cannot take images of any size"):
        build_network(Architecture(encoder="test_vit_relpos"), 3)


def test_other_stage_counts_work():
    network = build_network(Architecture(encoder="test_resnet", decoder_width=16), 3).eval()
    assert network.encoder.reductions == (4, 8, 16, 32)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 32)).shape == (1, 3, 16, 8)


BOMBS = [
    ({"embed_dim": 200_000}, "embed_dim: 200000 is beyond any model"),
    ({"depth": 10**7}, "depth: 10000000 is beyond any model, at most 128"),
    ({"depth": -(10**7)}, "beyond any model"),
    ({"img_size": 100_000}, "beyond any model"),
    ({"img_size": [4096, float("inf")]}, "beyond any model"),
    ({"mlp_ratio": [1.0] * 10**6}, "beyond any model"),
    ({"embed_dim": 16_384, "num_heads": 1, "depth": 60}, "do not fit the architecture"),
    ({"img_size": 16_384}, "do not fit the architecture"),
    ({"patch_size": 16_384}, "cannot take images of any size|do not fit"),
    ({"embed_dim": "abc"}, "does not take"),
    ({"num_heads": 0}, "no network can be built"),
]


@pytest.mark.parametrize(("options", "message"), BOMBS)
def test_a_card_of_any_size_costs_neither_memory_nor_time(options, message, tiny_model):
    card, state = load_model(tiny_model)
    architecture = card.architecture.model_copy(update={"encoder_options": options})
    with pytest.raises(WsssError, match=message) as error:
        restore_network(card.model_copy(update={"architecture": architecture}), state, "model.pt")
    assert len(str(error.value)) < 600


def test_tables_that_no_file_holds_are_bounded(tiny_model, monkeypatch):
    card, state = load_model(tiny_model)
    rotary = card.architecture.model_copy(update={"encoder": "vit_tiny_patch16_dinov3_qkvb"})
    monkeypatch.setattr("wsss_deploy.networks.network.MOST_TABLES", 10)
    with pytest.raises(WsssError, match=r"its tables take|do not fit"):
        restore_network(card.model_copy(update={"architecture": rotary}), state, "model.pt")
    restore_network(card, state, "model.pt")


def test_memory_that_is_not_there_is_one_sentence(tiny_model, monkeypatch):
    card, state = load_model(tiny_model)

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore")

    monkeypatch.setattr(SegmentationNetwork, "load_state_dict", full)
    with pytest.raises(ArtifactError, match=r"model\.pt: no network can be built .*can't allocate") as error:
        restore_network(card, state, "model.pt")
    assert "\n" not in str(error.value)
