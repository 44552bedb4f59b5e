from __future__ import annotations

import pytest
import torch

from training.losses.self_correspondence import (
    SelfCorrespondenceLoss,
    draw_coordinates,
    sample_points,
    self_correspondence_loss,
)

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
