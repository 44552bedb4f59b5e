"""The feature consistency head's losses against plain loops, and what they must not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from training.losses import (
    Kernel,
    block_labels,
    dense_pair_energy,
    feature_consistency_loss,
    feature_smoothness_loss,
    gated_crf_loss,
    pair_targets,
    unlabelled_blocks,
)
from wsss_deploy.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def example(size=(5, 6), channels=3, seed=0):
    torch.manual_seed(seed)
    features = torch.randn(2, channels, *size, dtype=torch.float64)
    targets = torch.randint(0, 3, (2, *size))
    targets[torch.rand(2, *size) < 0.3] = 255
    return features, targets


def by_loops(features, targets, radius, distance="l1"):
    """The equations, pair by pair."""
    sums, counts = [0.0, 0.0, 0.0], [1e-5, 1e-5, 1e-5]
    for n in range(len(features)):
        height, width = targets.shape[1:]
        for y in range(height):
            for x in range(width):
                for v in range(max(0, y - radius), min(height, y + radius + 1)):
                    for u in range(max(0, x - radius), min(width, x + radius + 1)):
                        one, two = targets[n, y, x].item(), targets[n, v, u].item()
                        if (y, x) == (v, u) or 255 in (one, two):
                            continue
                        g, q = features[n, :, y, x], features[n, :, v, u]
                        if distance == "l1":
                            a = torch.exp(-(g - q).abs().mean())
                        else:
                            a = torch.sigmoid(5 * F.cosine_similarity(g, q, dim=0))
                        place = 2 if one != two else 0 if one == 0 else 1
                        counts[place] += 1
                        sums[place] = sums[place] - torch.log((1 - a if place == 2 else a) + 1e-5)
    return sum(share * s / c for share, s, c in zip((0.25, 0.25, 0.5), sums, counts, strict=True)), counts


@pytest.mark.parametrize("distance", ["l1", "cosine"])
@pytest.mark.parametrize("radius", [1, 2, 9])
def test_it_is_the_equation(distance, radius):
    features, targets = example()
    expected, counts = by_loops(features.requires_grad_(), targets, radius, distance)
    (wanted,) = torch.autograd.grad(expected, features)
    found = feature_consistency_loss(features, targets, radius, distance=distance)
    (gradient,) = torch.autograd.grad(found.total, features)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(gradient, wanted)
    assert found.counts.tolist() == pytest.approx(counts)
    torch.testing.assert_close((found.parts * torch.tensor([0.25, 0.25, 0.5])).sum(), found.total.detach())


@pytest.mark.parametrize("distance", ["l1", "cosine"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(distance, padded):
    features, targets = example((4, 4))
    options = {"label_pad": 0, "count_centre": True} if padded else {}

    def loss(g):
        return feature_consistency_loss(g, targets, 2, distance=distance, **options).total

    assert torch.autograd.gradcheck(loss, features.requires_grad_())


def test_gradcheck_of_the_smoothness():
    features, targets = example((4, 5))
    image, valid = torch.rand(2, 3, 4, 5, dtype=torch.float64), targets != 255
    kernels = (Kernel(0.7, {"xy": 3.0, "rgb": 0.5}), Kernel(0.2, {"xy": 2.0}))
    assert torch.autograd.gradcheck(
        lambda g: feature_smoothness_loss(g, image, kernels, 2, valid), features.requires_grad_()
    )


def test_alike_features_of_two_classes_are_finite_and_pushed_by_nothing():
    """At distance 0 the logarithm is capped and the gradient of |0| is 0."""
    features = torch.zeros(1, 4, 3, 3, requires_grad=True)
    targets = torch.randint(0, 2, (1, 3, 3), generator=torch.Generator().manual_seed(0))
    loss = feature_consistency_loss(features, targets, 2)
    loss.total.backward()
    assert loss.parts[2].item() == pytest.approx(-math.log(1e-5), rel=1e-3)
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("label", [0, 1, 255])
def test_empty_sets_give_zero(label):
    features = torch.randn(1, 4, 4, 4, requires_grad=True)
    loss = feature_consistency_loss(features, torch.full((1, 4, 4), label), 1)
    loss.total.backward()
    assert loss.parts.isfinite().all()
    assert (loss.parts > 0).tolist() == [label == 0, label == 1, False]
    assert features.grad.isfinite().all()


def test_training_the_features_separates_the_classes():
    torch.manual_seed(0)
    features = (0.1 * torch.randn(1, 8, 8, 8)).requires_grad_()
    targets = torch.zeros(1, 8, 8, dtype=torch.long)
    targets[:, :, 4:] = 1
    optimizer = torch.optim.Adam([features], lr=0.1)
    first = feature_consistency_loss(features, targets, 4).total.item()
    for _ in range(60):
        loss = feature_consistency_loss(features, targets, 4).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    across = (features[..., 3] - features[..., 4]).abs().mean(1)
    within = (features[..., 2] - features[..., 3]).abs().mean(1)
    assert across.mean() > 4 * within.mean()


def test_half_precision_is_raised():
    features, targets = example()
    exact = feature_consistency_loss(features.bfloat16().float(), targets, 2).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = feature_consistency_loss(features.bfloat16(), targets, 2).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_memory_does_not_grow_with_the_window():
    """An autograd graph over the window would keep E channels for each of its offsets."""
    features = torch.randn(1, 32, 48, 48, requires_grad=True)
    targets = torch.randint(0, 2, (1, 48, 48))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        feature_consistency_loss(features, targets, 4)
    assert sum(kept) < 3 * features.numel()


def test_blocks_take_the_label_that_their_labelled_pixels_agree_on():
    labels = torch.full((1, 8, 8), 255)
    labels[0, 1, 2] = 3  # alone in its block
    labels[0, 0, 4], labels[0, 3, 7] = 2, 2  # agree
    labels[0, 4, 0], labels[0, 5, 1] = 0, 1  # disagree
    assert block_labels(labels, (2, 2)).tolist() == [[[3, 2], [255, 255]]]
    assert torch.equal(block_labels(labels, (8, 8)), labels)
    # Cells without any label; the one whose labels disagree has some.
    assert unlabelled_blocks(labels, (2, 2)).tolist() == [[[False, False], [False, True]]]
    assert torch.equal(unlabelled_blocks(labels, (8, 8)), labels == 255)
    for function in (block_labels, unlabelled_blocks):
        with pytest.raises(UsageError, match="whole stride"):
            function(labels, (3, 2))


KERNELS = (Kernel(1.0, {"xy": 2.0, "rgb": 1.0}),)
PAIR_LOSSES = {
    "gated_crf": lambda p, rgb: gated_crf_loss(p, KERNELS, {"rgb": rgb}, 2),
    "its kernel": lambda p, rgb: gated_crf_loss(p.detach(), KERNELS, {"rgb": p}, 2, kernel_gradient=True),
    "position alone": lambda p, rgb: gated_crf_loss(p, (Kernel(1.0, {"xy": 2.0}),), {}, 2),
    "dense": lambda p, rgb: dense_pair_energy(p, KERNELS, {"rgb": rgb}, *torch.ones(2, 1, 1, 5, 6).to(p)),
    "consistency": lambda p, rgb: feature_consistency_loss(p, (rgb[:, 0] > 0).long(), 2).total,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("scaled", [False, True])
def test_second_derivatives_are_an_error_and_not_0(name, scaled):
    torch.manual_seed(0)
    x, rgb = torch.randn(1, 3, 5, 6, dtype=torch.double, requires_grad=True), torch.randn(1, 3, 5, 6).double()
    factor = torch.tensor(2.0, dtype=torch.double, requires_grad=scaled)
    (plain,) = torch.autograd.grad(factor * PAIR_LOSSES[name](x.softmax(1), rgb), x)
    (slope,) = torch.autograd.grad(factor * PAIR_LOSSES[name](x.softmax(1), rgb), x, create_graph=True)
    torch.testing.assert_close(slope, plain)
    with pytest.raises(UsageError, match="first derivatives only"):
        torch.autograd.grad(slope.square().sum(), x, retain_graph=True)
    with pytest.raises(UsageError, match="first derivatives only"):
        slope.square().sum().backward()


def test_predictions_fill_what_is_unlabelled_where_they_are_sure():
    labels = torch.tensor([[[1, 255, 255]]])
    probabilities = torch.tensor([[0.99, 0.96, 0.94], [0.01, 0.04, 0.06]]).view(1, 2, 1, 3).requires_grad_()
    assert pair_targets(labels, probabilities, 0.95).tolist() == [[[1, 0, 255]]]
    assert pair_targets(labels, None, 0.95) is labels
    assert not pair_targets(labels, probabilities, 0.95).requires_grad


def test_bad_calls():
    features, targets = example()
    with pytest.raises(UsageError, match="expected"):
        feature_consistency_loss(features, targets[:, 1:], 2)
    with pytest.raises(UsageError, match="1 or more"):
        feature_consistency_loss(features, targets, 0)
    with pytest.raises(UsageError, match="one size"):
        feature_smoothness_loss(features, torch.zeros(2, 3, 4, 4), (Kernel(1.0, {"xy": 1.0}),), 1)
