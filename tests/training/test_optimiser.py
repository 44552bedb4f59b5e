from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import AveragedModel

from training.optimiser import build_optimizer, learning_rate, moving_average, set_learning_rate
from training.recipe import Optimisation
from wsss_deploy.card import Architecture
from wsss_deploy.networks import build_network


def test_the_rate_rises_linearly_and_falls_to_nothing():
    settings = Optimisation(iterations=100, learning_rate=1.0, warmup=0.1, power=1.0)
    rates = [learning_rate(t, settings) for t in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(0.91)
    assert max(rates) == rates[9]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.01)


def test_groups_cover_every_parameter_once_and_exempt_vectors_and_positions():
    network = build_network(Architecture(encoder="test_vit", decoder_width=16), 3)
    settings = Optimisation(learning_rate=1e-3, decoder_factor=7, weight_decay=0.1)
    optimizer = build_optimizer(network.encoder, [network.decoder], settings)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    plain = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert (id(parameter) in plain) == (parameter.ndim <= 1 or "pos_embed" in name or "token" in name), name
    set_learning_rate(optimizer, 1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 7e-3}


@pytest.mark.parametrize(
    ("encoder", "first", "last", "layers"),
    [
        ("test_vit", "model.pos_embed", "model.blocks.5.", 7),
        ("swin_tiny_patch4_window7_224", "model.patch_embed.", "model.layers.3.blocks.1.", 13),
        ("resnet10t", "model.conv1.", "model.layer4.0.", 5),
        ("poolformer_s12", "model.stem.", "model.stages.3.", 5),  # does not tell its layers
    ],
)
def test_deeper_layers_learn_faster(encoder, first, last, layers):
    network = build_network(Architecture(encoder=encoder, decoder_width=16), 3)
    settings = Optimisation(learning_rate=1e-3, decoder_factor=7, layer_decay=0.5)
    optimizer = build_optimizer(network.encoder, [network.decoder], settings)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in network.encoder.named_parameters()}
    assert {named[name] for name in named if name.startswith(first)} == {1e-3 * 0.5**layers}
    assert {named[name] for name in named if name.startswith(last)} == {1e-3 * 0.5}
    assert len(set(named.values())) == layers
    assert {rates[id(p)] for p in network.decoder.parameters()} == {7e-3}


def test_the_moving_average_follows_at_first_and_then_keeps_its_decay():
    network = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(network, multi_avg_fn=moving_average(0.8), use_buffers=True)
    expected = 0.0
    for count in range(60):
        value = float(count * count)
        torch.nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        decay = min(0.8, (1 + count) / (10 + count)) if count else 0.0
        expected = decay * expected + (1 - decay) * value
        assert float(average.module.weight.detach()) == pytest.approx(expected)


def test_the_moving_average_copies_counters():
    network = torch.nn.BatchNorm1d(2)
    average = AveragedModel(network, multi_avg_fn=moving_average(0.9), use_buffers=True)
    for _ in range(3):
        network.num_batches_tracked += 1
        average.update_parameters(network)
    assert int(average.module.num_batches_tracked) == 3


def test_momentum_is_sgds():
    network = build_network(Architecture(encoder="test_vit", decoder_width=16), 3)
    settings = Optimisation(optimiser="sgd", momentum=1e-4, weight_decay=0.0)
    optimizer = build_optimizer(network.encoder, [network.decoder], settings)
    assert {group["momentum"] for group in optimizer.param_groups} == {1e-4}
    with pytest.raises(ValidationError, match=r"momentum is sgd's; set optimiser: sgd"):
        Optimisation(momentum=0.5)
