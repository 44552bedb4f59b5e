"""Cross-entropy with a set of possible classes."""

from __future__ import annotations

import torch

from training.losses import absent_classes_loss


def example():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    valid = torch.rand(3, 2, 3) < 0.7
    return logits, present, valid


def test_is_the_negative_log_likelihood_of_the_set():
    logits, present, valid = example()
    likely = (logits.softmax(1) * present[:, :, None, None]).sum(1)
    counted = valid & present.any(1)[:, None, None]
    expected = -likely[counted].log().mean()
    torch.testing.assert_close(absent_classes_loss(logits, present, valid), expected)


def test_gradient_is_finite_and_only_where_a_class_is_absent():
    logits, present, valid = example()
    assert torch.autograd.gradcheck(lambda x: absent_classes_loss(x, present, valid), logits)
    absent_classes_loss(logits, present, valid).backward()
    assert logits.grad[0].abs().max() > 0
    assert logits.grad[1:].abs().max() == 0


def test_extreme_logits_and_nothing_that_counts():
    logits, present, valid = example()
    assert absent_classes_loss(1e4 * logits.detach().float(), present, valid).isfinite()
    assert absent_classes_loss(logits, present, torch.zeros_like(valid)) == 0
    assert absent_classes_loss(logits, torch.zeros_like(present), valid) == 0
    half = absent_classes_loss(logits.detach().bfloat16(), present, valid)
    assert half.dtype == torch.float32
