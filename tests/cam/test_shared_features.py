from __future__ import annotations

import pytest
import torch

from training.cam.image_bank import ImageBank
from training.cam.prototypes import SharedFeatureHead, classifier_cams, prototype_cams, prototypes, seeds
from training.losses.shared_feature import (
    bank_term,
    classification_loss,
    distribution_coefficients,
    prototype_consistency,
    scale_consistency,
)
from wsss_deploy.errors import UsageError


def test_the_published_bank_term():
    assert bank_term(660, 4, 20) == pytest.approx(396)


def test_coefficients_are_large_for_the_rarest_and_the_commonest():
    found = distribution_coefficients((4000, *[600] * 10, 200), 396.0)
    assert found.mean() == pytest.approx(1)
    assert found.argmax() == 11
    assert found[0] > 2 * found[5]


@pytest.mark.parametrize("counts", [(5, 5, 5), (0, 0), (7,)])
def test_equal_counts_weigh_equally(counts):
    assert (distribution_coefficients(counts, 0.0) == 1).all()


def test_a_class_without_images_is_finite():
    assert distribution_coefficients((0, 3, 10), 0.0).isfinite().all()
    with pytest.raises(UsageError, match="one count per class"):
        distribution_coefficients((-1, 3), 0.0)


def test_unknown_tags_do_not_count():
    scores = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
    nan = float("nan")
    loss = classification_loss(scores, torch.tensor([[1.0, nan], [nan, nan]]))
    torch.testing.assert_close(loss, torch.nn.functional.softplus(torch.tensor(-2.0)))
    loss.backward()
    assert scores.grad[1].abs().sum() == 0
    nothing = classification_loss(scores, torch.full((2, 2), nan))
    assert nothing.item() == 0


def test_zero_cams_give_background_and_no_nan():
    scores = torch.full((1, 2, 4, 4), -1.0, requires_grad=True)
    cams = classifier_cams(scores, (4, 4))
    assert (cams[:, 0] == 1).all()
    assert (cams[:, 1:] == 0).all()
    feature = torch.randn(1, 6, 4, 4, requires_grad=True)
    found = prototypes(feature, seeds(cams, torch.ones(1, 3, 4, 4)))
    assert (found[:, 1:] == 0).all()
    again = prototype_cams(feature, found)
    assert (again[:, 1:] == 0).all()
    loss = prototype_consistency(cams, again, torch.ones(2)) + scale_consistency(
        cams, cams[:, :, ::2, ::2], torch.ones(1, 2), torch.ones(2)
    )
    loss.backward()
    assert feature.grad.isfinite().all()
    assert scores.grad.isfinite().all()


def test_the_head_trains_on_any_levels():
    torch.manual_seed(0)
    head = SharedFeatureHead((4, 6, 8, 8), 2, (3, 3, 5, 5))
    levels = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((4, 16), (6, 8), (8, 4), (8, 4))]
    image, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 3, 4, 4)
    mask[:, 2] = 0
    maps = head(image, levels, mask)
    assert (maps.smoothed[:, 2] == 0).all()
    assert (maps.prototype[:, 2] == 0).all()
    (maps.scores.sum() + prototype_consistency(maps.smoothed, maps.prototype, torch.ones(2))).backward()
    assert all(level.grad is None for level in levels[:3]), "the hierarchical feature stops gradients"
    assert levels[3].grad.isfinite().all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    with pytest.raises(UsageError, match="one width a level"):
        SharedFeatureHead((4, 6), 2)


def test_the_bank_keeps_the_newest_and_draws_filled_slots_only():
    bank = ImageBank(3, 4)
    assert len(bank.draw(5).image) == 0, "an empty bank gives nothing"
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    tags = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0], [0, float("nan"), 0]])
    bank.update(images, torch.ones(3, 4, 4, dtype=torch.bool), tags)
    drawn = bank.draw(50)
    assert (drawn.image == 1).all(), "class 2 was never seen; the image without a known class is not kept"
    assert (drawn.tags[:, :2] == 1).all()
    other = ImageBank(3, 4)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.draw(2).image, drawn.image[:2])
