from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.losses import PartialCrossEntropyLoss, class_weights_from_counts, partial_cross_entropy
from wsss_deploy.errors import UsageError


def sample(classes=4, labelled=0.2, dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 5, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes, (2, 20, 24))
    labels[torch.rand(2, 20, 24) > labelled] = 255
    return logits, labels


def by_hand(logits, labels, weights):
    """Mean over labelled pixels of the upsampled logits, pixel by pixel, in numpy."""
    full = F.interpolate(logits.detach(), size=labels.shape[-2:], mode="bilinear", align_corners=False).numpy()
    total = norm = 0.0
    for n, y, x in np.argwhere(labels.numpy() != 255):
        values, label = full[n, :, y, x], int(labels[n, y, x])
        total += weights[label] * (np.log(np.exp(values).sum()) - values[label])
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 0.5]])
@pytest.mark.parametrize("labelled", [0.02, 0.2, 1.0])
def test_equals_the_definition(weights, labelled):
    logits, labels = sample(labelled=labelled)
    loss = partial_cross_entropy(logits, labels, None if weights is None else torch.tensor(weights))
    assert loss.item() == pytest.approx(by_hand(logits, labels, weights or [1.0] * 4), rel=1e-6 if weights else 1e-12)


@pytest.mark.parametrize("labelled", [0.02, 1.0])
def test_gradient(labelled):
    logits, labels = sample(labelled=labelled)
    assert torch.autograd.gradcheck(lambda z: partial_cross_entropy(z, labels), logits)


def test_nothing_labelled_is_exactly_zero_and_trains_on():
    logits, labels = sample()
    for weights in (None, torch.ones(4)):
        loss = partial_cross_entropy(logits, torch.full_like(labels, 255), weights)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


def test_only_classes_of_weight_zero_labelled():
    logits, labels = sample()
    loss = partial_cross_entropy(logits, torch.where(labels == 255, 255, 2), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert loss.item() == 0


def test_half_precision_is_computed_in_float32():
    logits, labels = sample(dtype=torch.float32)
    half = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = partial_cross_entropy(half, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, partial_cross_entropy(half.detach().float(), labels))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_function_equals_module():
    logits, labels = sample(dtype=torch.float32)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = PartialCrossEntropyLoss(weights)
    assert torch.equal(module(logits, labels), partial_cross_entropy(logits, labels, weights))
    assert "class_weights=(4,)" in repr(module)
    assert "class_weights=off" in repr(PartialCrossEntropyLoss())


def test_class_weights_of_the_published_click_counts():
    # Histogram and weights as the specification quotes them from the released click files.
    counts = [32614, 960, 823, 1247, 1023, 1415, 660, 2347, 1278, 3201, 747]
    counts += [777, 1596, 801, 805, 10472, 1186, 1003, 777, 691, 888]
    expected = [0.01198, 0.05179, 0.05270, 0.04998, 0.05138, 0.04898, 0.05384, 0.04412, 0.04979, 0.04049, 0.05323]
    expected += [0.05302, 0.04795, 0.05285, 0.05283, 0.02430, 0.05035, 0.05151, 0.05302, 0.05362, 0.05227]
    weights = class_weights_from_counts(counts)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=5.1e-6)
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1], [[1, 2]]])
def test_bad_counts(counts):
    with pytest.raises(UsageError, match="expected one per class"):
        class_weights_from_counts(counts)


@pytest.mark.parametrize(
    ("logits", "labels", "weights", "words"),
    [
        ((2, 4, 5), (2, 20, 24), None, r"logits are \(2, 4, 5\)"),
        ((2, 4, 5, 6), (2, 1, 20, 24), None, r"labels \(2, 1, 20, 24\)"),
        ((2, 4, 5, 6), (3, 20, 24), None, r"expected \(N, C, h, w\) and \(N, H, W\)"),
        ((2, 4, 5, 6), (2, 20, 24), 3, r"\(3,\) class weights for 4 classes"),
    ],
)
def test_what_does_not_fit_is_named(logits, labels, weights, words):
    given = None if weights is None else torch.ones(weights)
    with pytest.raises(UsageError, match=words):
        partial_cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64), given)
