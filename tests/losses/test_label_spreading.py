"""Labels carried along paths of like colour."""

from __future__ import annotations

import heapq
import math

import pytest
import torch

from training.losses import spread_labels
from wsss_deploy.errors import UsageError


def by_dijkstra(labels, image, rgb, xy, limit):
    height, width = labels.shape
    cost = {}
    queue = [(0.0, y, x, int(labels[y, x])) for y in range(height) for x in range(width) if labels[y, x] != 255]
    heapq.heapify(queue)
    while queue:
        value, y, x, label = heapq.heappop(queue)
        if (y, x) in cost:
            continue
        cost[y, x] = (value, label)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                v, u = y + dy, x + dx
                if 0 <= v < height and 0 <= u < width and (dy or dx):
                    step = (image[:, y, x] - image[:, v, u]).norm().item() / rgb + math.hypot(dy, dx) / xy
                    if value + step <= limit:
                        heapq.heappush(queue, (value + step, v, u, label))
    out = torch.full_like(labels, 255)
    for (y, x), (_, label) in cost.items():
        out[y, x] = label
    return out


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_shortest_path(seed):
    torch.manual_seed(seed)
    image = torch.rand(2, 3, 12, 14)
    labels = torch.full((2, 12, 14), 255)
    for n in range(2):
        for label in range(3):
            labels[n, torch.randint(12, ()), torch.randint(14, ())] = label
    found = spread_labels(labels, image, 1.5, 6.0, 1.2)
    for n in range(2):
        assert torch.equal(found[n], by_dijkstra(labels[n], image[n], 1.5, 6.0, 1.2))


def test_a_border_stops_it_and_distance_does():
    image = torch.zeros(1, 3, 5, 40)
    image[..., 10:] = 3.0
    labels = torch.full((1, 5, 40), 255)
    labels[0, 2, 5] = 1
    row = spread_labels(labels, image, 1.0, 8.0)[0, 2]
    assert (row[:10] == 1).all()
    assert (row[10:] == 255).all()
    labels[0, 2, 20] = 0
    row = spread_labels(labels, image, 1.0, 8.0)[0, 2]
    assert row[12:29].tolist() == [0] * 17  # eight pixels to either side cost 1, the limit
    assert row[11] == row[29] == 255
    row = spread_labels(labels, image, 1.0, 8.0, 0.5)[0, 2]
    assert (row == 0).nonzero().flatten().tolist() == list(range(16, 25))


def test_given_labels_stay_and_the_input_is_not_changed():
    labels = torch.full((1, 4, 4), 255)
    labels[0, 0, 0], labels[0, 0, 1] = 2, 1
    before = labels.clone()
    found = spread_labels(labels, torch.zeros(1, 3, 4, 4), 1.0, 8.0)
    assert torch.equal(labels, before)
    assert found[0, 0, :2].tolist() == [2, 1]
    nothing = torch.full((1, 4, 4), 255)
    assert torch.equal(spread_labels(nothing, torch.zeros(1, 3, 4, 4), 1.0, 8.0), nothing)


def test_sizes_must_agree():
    with pytest.raises(UsageError, match="one size"):
        spread_labels(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 3, 8, 8), 1.0, 8.0)
