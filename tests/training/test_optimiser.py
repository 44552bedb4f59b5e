from __future__ import annotations

import pytest

from training.optimiser import build_optimizer, learning_rate, set_learning_rate
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
