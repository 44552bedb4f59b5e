"""Labels carried on by a walk that ends where the first label is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.cam import random_walk as module
from training.cam.random_walk import label_parts, random_walk


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(2, 3, 4, 5, generator=generator).softmax(dim=1)
    feature = torch.randn(2, 6, 4, 5, generator=generator)
    given = torch.zeros(2, 3, 4, 5)
    given[0, 0, 0, 0], given[0, 2, 3, 4], given[1, 1, 2, 2] = 1, 2, 5
    given[0, :, 1, 1] = torch.tensor([3.0, 1.0, 0.0])
    return maps, feature, given


def by_steps(maps, feature, given, power, restart, steps=2000):
    """The same by walking: positions one at a time, until nothing changes."""
    maps, given = maps.double().flatten(1), given.double().flatten(1)
    unit = F.normalize(feature.double().flatten(1), dim=0)
    known = given.sum(dim=0) > 0
    fixed = given / given.sum(dim=0).clamp(min=1e-300)
    found = torch.where(known, fixed, maps)
    weights = torch.zeros(maps.shape[1], maps.shape[1], dtype=torch.float64)
    for i in range(len(weights)):
        for j in range(len(weights)):
            weights[i, j] = 0 if i == j else torch.exp(power * (unit[:, i] @ unit[:, j]))
    weights /= weights.sum(dim=1, keepdim=True)
    for _ in range(steps):
        found = torch.where(known, fixed, (1 - restart) * found @ weights.T + restart * maps)
    return found


@pytest.mark.parametrize(("power", "restart"), [(10.0, 0.05), (3.0, 0.5)])
def test_it_is_where_a_walk_ends(problem, power, restart):
    found = random_walk(*problem, power, restart)
    for own, *parts in zip(found, *problem, strict=True):
        expected = by_steps(*parts, power, restart)
        np.testing.assert_allclose(own.flatten(1).double().numpy(), expected.numpy(), atol=1e-5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 4, 5))


def test_given_labels_stay_and_parts_of_them_too(problem):
    found = random_walk(*problem, 10.0, 0.05)
    assert found[0, :, 0, 0].tolist() == [1, 0, 0]
    assert found[0, :, 1, 1].tolist() == [0.75, 0.25, 0]
    assert found[1, :, 2, 2].tolist() == [0, 1, 0]


def test_a_label_goes_to_what_looks_alike():
    # Two kinds of positions side by side, one label of each, and a classifier that knows nothing.
    feature = torch.zeros(1, 2, 6, 6)
    feature[:, 0, :, :3], feature[:, 1, :, 3:] = 1, 1
    given = torch.zeros(1, 2, 6, 6)
    given[0, 0, 0, 0], given[0, 1, 5, 5] = 1, 1
    found = random_walk(torch.full((1, 2, 6, 6), 0.5), feature, given, 10.0, 0.01)
    assert bool((found[0, 0, :, :3] > 0.8).all())
    assert bool((found[0, 1, :, 3:] > 0.8).all())


def test_ends_of_the_options(problem):
    maps, feature, given = problem
    torch.testing.assert_close(random_walk(maps, feature, torch.zeros_like(given), 10.0, 0.05), maps)
    every = torch.rand_like(given) + 0.1
    torch.testing.assert_close(random_walk(maps, feature, every, 10.0, 0.05), every / every.sum(dim=1, keepdim=True))
    # A walk that ends at once is the classifier's word.
    alone, known = random_walk(maps, feature, given, 10.0, 1.0), given.sum(dim=1, keepdim=True) > 0
    torch.testing.assert_close(alone.where(~known, maps), maps)
    # Positions without features are as far from each other as from all others, and nothing breaks.
    assert bool(random_walk(maps, torch.zeros_like(feature), given, 10.0, 0.05).isfinite().all())
    one = random_walk(maps[..., :1, :1], feature[..., :1, :1], torch.zeros(2, 3, 1, 1), 10.0, 0.05)
    torch.testing.assert_close(one, maps[..., :1, :1])


def test_finer_maps_are_averaged(problem, monkeypatch):
    maps, feature, given = (F.interpolate(part, scale_factor=2, mode="nearest") for part in problem)
    monkeypatch.setattr(module, "_POSITIONS", 20)
    found = random_walk(maps, feature, given, 10.0, 0.05)
    assert found.shape == maps.shape
    coarse = random_walk(*problem, 10.0, 0.05)
    torch.testing.assert_close(found, F.interpolate(coarse, size=(8, 10), mode="bilinear", align_corners=False))


def test_labels_of_a_cell_are_counted():
    labels = torch.full((2, 5, 7), 255)
    labels[0, 0, 0], labels[0, 1, 2], labels[0, 4, 6], labels[1, 2, 3] = 1, 0, 2, 1
    parts = label_parts(labels, (2, 3), 3)
    # Rows 0 to 2 are the upper cells, columns 0 to 2 the left ones, 3 and 4 the middle.
    expected = torch.zeros(2, 3, 2, 3)
    expected[0, 1, 0, 0], expected[0, 0, 0, 0], expected[0, 2, 1, 2], expected[1, 1, 0, 1] = 1, 1, 1, 1
    torch.testing.assert_close(parts, expected)
