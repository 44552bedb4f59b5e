"""Relaxations of the Potts model and the soft pseudo-labels that minimise one."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from training.losses import collision_cross_entropy, potts, potts_energy, soft_labels
from training.losses.potts import Relaxation
from wsss_deploy.errors import UsageError

RELAXATIONS = get_args(Relaxation)


def distributions(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).softmax(1)


@pytest.mark.parametrize(
    ("relaxation", "expected"),
    [
        ("bilinear", 1 - 0.21),
        ("quadratic", 0.25),
        ("normalized_quadratic", 1 - 0.21 / 0.46),
        ("collision_cross_entropy", -math.log(0.21)),
        ("collision_divergence", -math.log(0.21 / 0.46)),
        ("log_quadratic", -math.log(1 - 0.25)),
    ],
)
def test_values_by_hand(relaxation, expected):
    """<p, q> = 0.21, |p|^2 = |q|^2 = 0.46, |p - q|^2 = 0.5."""
    p, q = torch.tensor([[0.6, 0.1, 0.3]]), torch.tensor([[0.1, 0.6, 0.3]])
    assert potts(p, q, relaxation).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_they_are_potts_at_the_corners_and_symmetric(relaxation):
    corners = torch.eye(3, dtype=torch.float64)
    same = potts(corners, corners, relaxation)
    other = potts(corners, corners.roll(1, 0), relaxation)
    torch.testing.assert_close(same, torch.zeros_like(same))
    assert (other >= 1 - 1e-9).all()
    p, q = distributions(5, 4), distributions(5, 4, seed=1)
    torch.testing.assert_close(potts(p, q, relaxation), potts(q, p, relaxation))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_gradcheck(relaxation):
    logits = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[:, 0, 0] = False
    assert torch.autograd.gradcheck(lambda z: potts_energy(z.softmax(1), image, 0.5, relaxation, valid), logits)
    sigma = distributions(1, 3, 3, 4)
    assert torch.autograd.gradcheck(lambda z: collision_cross_entropy(z.softmax(1), sigma).sum(), logits)


def test_the_energy_is_a_sum_over_the_eight_neighbours():
    labels, image = distributions(1, 3, 4, 5), torch.rand(1, 3, 4, 5, dtype=torch.float64)
    total = 0.0
    for y in range(4):
        for x in range(5):
            for v in range(4):
                for u in range(5):
                    if (y, x) < (v, u) and max(abs(y - v), abs(x - u)) == 1:
                        w = torch.exp(-(image[0, :, y, x] - image[0, :, v, u]).square().sum() / (2 * 0.4**2))
                        w = w / math.hypot(y - v, x - u)
                        total += w * potts(labels[..., y, x], labels[..., v, u], "collision_divergence")[0]
    torch.testing.assert_close(potts_energy(labels, image, 0.4, "collision_divergence"), total)


def test_a_uniform_pseudo_label_asks_nothing_of_the_network():
    """What tells collision cross-entropy from cross-entropy."""
    logits = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    uniform = torch.full((1, 4, 1, 1), 0.25, dtype=torch.float64)
    collision_cross_entropy(uniform, logits.softmax(1)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def solve(sigma, seeds, image, **changes):
    options = {"eta": 0.3, "strength": 6.0, "rgb": 0.2, "relaxation": "collision_divergence", "steps": 60, "rate": 0.1}
    return soft_labels(sigma, seeds, image, **options | changes)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_sub_problem_goes_downhill(relaxation):
    torch.manual_seed(0)
    sigma = distributions(1, 3, 8, 8).float()
    image = F.interpolate(torch.rand(1, 3, 2, 2), size=(8, 8))
    seeds = torch.full((1, 8, 8), 255)
    seeds[0, 0, 0], seeds[0, 7, 7] = 0, 2
    free = (seeds == 255).float()

    def energy(y):
        tie = 0.3 * (free * collision_cross_entropy(y, sigma)).sum()
        return (tie + 6 * potts_energy(y, image, 0.2, relaxation)).item()

    few, many = (energy(solve(sigma, seeds, image, relaxation=relaxation, steps=steps)) for steps in (1, 60))
    start = torch.where(free[:, None] > 0, sigma, F.one_hot(seeds % 255, 3).movedim(-1, 1).float())
    assert many < few < energy(start)


def test_seeds_stay_and_their_class_fills_a_flat_region_up_to_the_border():
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 2.0
    sigma = torch.full((1, 2, 8, 8), 0.5)
    seeds = torch.full((1, 8, 8), 255)
    seeds[0, 4, 0], seeds[0, 4, 7] = 0, 1
    y = solve(sigma, seeds, image, steps=300)
    assert y[0, :, 4, 0].tolist() == [1, 0]
    assert (y[0, 0, :, :4] > 0.8).all()
    assert (y[0, 1, :, 4:] > 0.8).all()
    assert not y.requires_grad


def test_saturated_predictions_and_padding_are_finite():
    sigma = F.one_hot(torch.randint(0, 3, (1, 6, 6)), 3).movedim(-1, 1).float()
    valid = torch.zeros(1, 6, 6, dtype=torch.bool)
    valid[:, :3] = True
    y = solve(sigma, torch.full((1, 6, 6), 255), torch.rand(1, 3, 6, 6), valid=valid)
    assert y.isfinite().all()
    torch.testing.assert_close(y.sum(1), torch.ones(1, 6, 6))
    torch.testing.assert_close(y[:, :, 4:], sigma[:, :, 4:], atol=1e-3, rtol=0)  # nothing acts on padding


def test_unknown_relaxation():
    with pytest.raises(UsageError, match="choose one of: bilinear"):
        potts(distributions(1, 2), distributions(1, 2), "cubic")
