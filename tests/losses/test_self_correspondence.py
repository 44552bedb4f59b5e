from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.losses.balanced_cross_entropy import balanced_cross_entropy
from training.losses.self_correspondence import (
    SelfCorrespondenceLoss,
    draw_coordinates,
    sample_points,
    scale_consistency_loss,
    self_correspondence_loss,
)
from wsss_deploy.errors import UsageError


def halves(channels, size):
    """Channel 0 on the left half, channel 1 on the right."""
    maps = torch.zeros(1, channels, size, size)
    maps[:, 0, :, : size // 2] = 1
    maps[:, 1, :, size // 2 :] = 1
    return maps


def test_logits_that_agree_with_the_cams_score_best():
    torch.manual_seed(0)
    points = [draw_coordinates(1, 8, torch.zeros(1)) for _ in range(2)]
    cams, small = halves(2, 32), halves(2, 8)
    losses = [
        self_correspondence_loss(cams, small, logits, F.interpolate(logits, size=(8, 8)), *points).item()
        for logits in (halves(3, 32), halves(3, 32).transpose(2, 3), -halves(3, 32).flip(3))
    ]
    assert losses[0] < losses[1] - 0.1
    assert losses[2] == pytest.approx(losses[0], abs=0.05), "only the pairs' similarity counts"
    assert abs(losses[0]) <= 2


def test_gradient_reaches_both_segmentations_and_no_cam():
    torch.manual_seed(0)
    cams, small_cams, logits, small = (
        torch.randn(2, c, s, s, requires_grad=True) for c, s in ((3, 16), (3, 8), (4, 16), (4, 8))
    )
    SelfCorrespondenceLoss(6)(cams, small_cams, logits, small).backward()
    assert cams.grad is None
    assert small_cams.grad is None
    assert logits.grad.abs().sum() > 0
    assert small.grad.abs().sum() > 0


def test_zero_cams_and_zero_logits_give_no_nan():
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    zero = torch.zeros(1, 2, 8, 8)
    loss = SelfCorrespondenceLoss(4)(zero, zero, logits, logits)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()


def test_views_must_agree():
    with pytest.raises(UsageError, match="cams of the two views"):
        SelfCorrespondenceLoss(2)(*(torch.zeros(1, c, 4, 4) for c in (2, 3, 2, 2)))


def test_consistency_has_a_gradient_only_when_repaired():
    cams, small = (torch.rand(2, 3, size, size, requires_grad=True) for size in (16, 8))
    repaired = scale_consistency_loss(cams, small)
    repaired.backward()
    assert cams.grad.abs().sum() > 0
    assert small.grad.abs().sum() > 0
    parity = scale_consistency_loss(cams, small, "parity")
    assert not parity.requires_grad
    torch.testing.assert_close(parity, scale_consistency_loss(cams[:, 1:], small[:, 1:]).detach())
    assert scale_consistency_loss(cams[:, :1], small[:, :1], "parity").item() == 0


@pytest.mark.parametrize("only", [0, 1, 255])
def test_balanced_cross_entropy_without_a_side(only):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), only)
    loss = balanced_cross_entropy(logits, labels)
    loss.backward()
    assert logits.grad.isfinite().all()
    expected = 0.0 if only == 255 else F.cross_entropy(logits, labels).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


HALVES = torch.zeros(1, 2, 8, 8)
HALVES[:, 0, :, :4], HALVES[:, 1, :, 4:] = 1, 1


def gradient(mode):
    """Of logits that are nearly the same everywhere; positive where the halves are pushed apart."""
    logits = (torch.ones(1, 2, 8, 8) + 0.1 * HALVES).requires_grad_()
    torch.manual_seed(0)
    points = [draw_coordinates(1, 12, logits) for _ in range(2)]
    self_correspondence_loss(HALVES, HALVES, logits, logits, *points, mode=mode).backward()
    # Along the difference of the channels, which is what tells the halves apart.
    return float(((logits.grad[:, 0] - logits.grad[:, 1]) * (HALVES[:, 1] - HALVES[:, 0])).sum())


def test_only_without_the_mean_positions_are_pushed_apart():
    assert gradient("repaired") > 0
    # As released, pairs across the halves have a target of about 0 and nothing is pushed anywhere to speak of.
    assert abs(gradient("parity")) < 0.2 * gradient("repaired")


def test_without_the_mean_the_same_everywhere_is_worth_nothing():
    logits = torch.ones(1, 3, 8, 8)
    torch.manual_seed(0)
    losses = {mode: SelfCorrespondenceLoss(12, mode)(HALVES, HALVES, logits, logits) for mode in ("parity", "repaired")}
    assert losses["repaired"] == pytest.approx(0, abs=1e-5)
    assert losses["parity"] < -0.3


def test_points_lie_in_the_image():
    valid = torch.zeros(3, 6, 11, dtype=torch.bool)
    valid[0, 2:5, 3:9] = True
    valid[1] = True
    points = draw_coordinates(3, 40, torch.zeros(1), valid)
    seen = sample_points(valid[:, None].float(), points)
    assert (seen[:2] > 0.999).all(), "never between a pixel of the image and one of the padding"
    x, y = points[0].unbind(-1)
    assert x.min() == pytest.approx(3 / 10 * 2 - 1, abs=0.05)
    assert x.max() == pytest.approx(8 / 10 * 2 - 1, abs=0.05)
    assert y.min() == pytest.approx(2 / 5 * 2 - 1, abs=0.05)
    assert y.max() == pytest.approx(4 / 5 * 2 - 1, abs=0.05)
    assert points[2].min() < -0.9, "an image that is all padding is taken as a whole"
    torch.manual_seed(3)
    free = draw_coordinates(2, 4, torch.zeros(1))
    torch.manual_seed(3)
    torch.testing.assert_close(draw_coordinates(2, 4, torch.zeros(1), valid[1:2].expand(2, -1, -1)), free)
