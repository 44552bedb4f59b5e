"""UperNet's decoder, which alone sees the whole image."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from wsss_deploy.card import Architecture
from wsss_deploy.networks.upernet import POOL_SCALES, UperNetDecoder, adaptive_average


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 11), (12, 6), (16, 24)])
@pytest.mark.parametrize("side", POOL_SCALES)
def test_pooling_by_products_is_adaptive_pooling(size, side):
    maps = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    pooled = adaptive_average(maps, side)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(maps, side))
    weight = torch.randn_like(pooled)
    found = torch.autograd.grad((pooled * weight).sum(), maps)[0]
    expected = torch.autograd.grad((F.adaptive_avg_pool2d(maps, side) * weight).sum(), maps)[0]
    torch.testing.assert_close(found, expected)


def decoder_and_maps(strides=(4, 8, 16, 32), channels=(6, 8, 10, 12), size=64):
    torch.manual_seed(0)
    decoder = UperNetDecoder(channels, strides, 16, 5)
    maps = [
        torch.randn(2, count, size // stride, size // stride) for count, stride in zip(channels, strides, strict=True)
    ]
    return decoder, torch.randn(2, 3, size, size), maps


def test_every_level_and_parameter_takes_part():
    decoder, image, maps = decoder_and_maps()
    for level in maps:
        level.requires_grad_()
    logits = decoder(image, maps)
    assert logits.shape == (2, 5, 16, 16)
    F.cross_entropy(logits, torch.randint(0, 5, (2, 16, 16))).backward()
    assert all(level.grad.abs().max() > 0 for level in maps)
    assert not [name for name, parameter in decoder.named_parameters() if parameter.grad is None]


def test_images_of_a_batch_do_not_influence_each_other_but_far_pixels_do():
    decoder, image, maps = decoder_and_maps()
    decoder.classify[0].p = 0.0
    whole = decoder(image, maps)
    torch.testing.assert_close(decoder(image[1:], [level[1:] for level in maps]), whole[1:])
    changed = [*maps[:-1], maps[-1].clone()]
    changed[-1][:, :, 0, 0] += 5
    assert (decoder(image, changed) - whole)[:, :, -1, -1].abs().max() > 1e-4


def test_the_fused_map_is_what_the_logits_come_from():
    decoder, image, maps = decoder_and_maps()
    decoder.eval()
    fused = decoder.fuse(maps)
    assert fused.shape == (2, 16, 16, 16)
    torch.testing.assert_close(decoder.project(image, fused), decoder(image, maps))


def test_swin_with_upernet_trains_at_small_size(make_network):
    options = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}
    architecture = Architecture(
        encoder="swin_tiny_patch4_window7_224", decoder="upernet", decoder_width=16, encoder_options=options
    )
    network = make_network(architecture, drop_path=0.1).train()
    assert network.encoder.reductions == (4, 8, 16, 32)
    logits = network(torch.randn(1, 3, 64, 96))
    assert logits.shape == (1, 5, 16, 24)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.slow
def test_the_graph_takes_any_size(tmp_path):
    decoder, _, maps = decoder_and_maps(strides=(16, 16), channels=(6, 8))
    decoder.eval()
    batch, high, wide = (torch.export.Dim(name) for name in ("batch", "high", "wide"))
    level = {0: batch, 2: high, 3: wide}

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, fine, coarse):
            return self.decoder.fuse([fine, coarse])

    path = tmp_path / "decoder.onnx"
    torch.onnx.export(
        Decode().eval(), (maps[0], maps[1]), path, dynamo=True, opset_version=20, external_data=False,
        dynamic_shapes=(level, level), input_names=["fine", "coarse"], verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 1, 1), (2, 5, 13), (3, 7, 4)):
        fine, coarse = torch.randn(shape[0], 6, *shape[1:]), torch.randn(shape[0], 8, *shape[1:])
        (found,) = session.run(None, {"fine": fine.numpy(), "coarse": coarse.numpy()})
        with torch.no_grad():
            expected = decoder.fuse([fine, coarse])
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-3)
