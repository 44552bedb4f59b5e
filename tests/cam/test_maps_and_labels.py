from __future__ import annotations

import pytest
import torch

from training.cam import labels
from training.cam.correction import corrected_labels
from training.cam.labels import LabelRule, band_labels, plain_labels, present_cams, refined_labels, sure_labels
from training.cam.maps import multi_scale_cams, normalise_cams, pool_scores
from training.cam.propagation import propagated_cams, propagated_labels, refined_in_box
from training.losses.attention_affinity import affinity_labels, affinity_loss
from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import PairwiseParameters
from wsss_deploy.pairwise.guides import make_guide, opponent_guide

SMALL = PairwiseParameters(kind="varm", dilations=(1, 2), iterations=3)


def test_pooling_runs_from_average_to_maximum():
    maps = torch.randn(2, 3, 4, 5)
    flat = maps.flatten(2)
    torch.testing.assert_close(pool_scores(maps, 1.0), flat.mean(2))
    torch.testing.assert_close(pool_scores(maps, 0.0), flat.amax(2))
    torch.testing.assert_close(pool_scores(maps, 0.1), flat.topk(2, dim=2).values.mean(2))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_padding_takes_no_part_in_pooling(fraction):
    maps = torch.randn(2, 3, 4, 4)
    valid = torch.zeros(2, 4, 4)
    valid[0, :, :2] = 1
    padded = maps.clone()
    padded[0, :, :, 2:] = 100
    found = pool_scores(padded, fraction, valid)
    torch.testing.assert_close(found[:1], pool_scores(maps[:1, :, :, :2], fraction))
    # Nothing valid: all cells count, and nothing is NaN.
    torch.testing.assert_close(found[1:], pool_scores(maps[1:], fraction))


def test_a_constant_map_becomes_zero():
    maps = torch.stack([torch.full((4, 4), 3.0), torch.eye(4)])[None]
    found = normalise_cams(maps)
    assert (found[0, 0] == 0).all()
    assert found[0, 1].max() == pytest.approx(1, abs=1e-4)


def test_cams_follow_a_flip():
    image = torch.rand(1, 3, 32, 48)

    def scores(view):
        return torch.nn.functional.avg_pool2d(view[:, :2] * torch.linspace(0.2, 1, view.shape[3]), 8)

    cams = multi_scale_cams(scores, image, (1.0, 0.5), stride=16)
    torch.testing.assert_close(multi_scale_cams(scores, image.flip(3), (1.0, 0.5), stride=16), cams.flip(3))
    assert cams.shape == (1, 2, 32, 48)
    with pytest.raises(UsageError, match="no scales"):
        multi_scale_cams(scores, image, ())


def scene():
    """A bright square of class 1 on dark ground, its CAM blurred over the edge; class 2 scores everywhere, absent."""
    image = torch.zeros(2, 3, 32, 32)
    image[:, :, 8:24, 8:24] = 1
    image = (image + 0.02 * torch.rand(image.shape)).clamp(0, 1)
    cams = torch.zeros(2, 2, 32, 32)
    cams[:, 0] = torch.nn.functional.avg_pool2d(image[:, :1].mean(1, keepdim=True), 9, 1, 4)[:, 0]
    cams[:, 1] = 0.99
    return image, cams, torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def test_refinement_brings_labels_to_the_edge():
    image, cams, tags = scene()
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    truth = torch.zeros(2, 32, 32, dtype=torch.long)
    truth[:, 8:24, 8:24] = 1
    wrong = {}
    for name, refiner in (("plain", None), ("refined", SMALL)):
        labels = refined_labels(image, cams, tags, valid, LabelRule(refiner=refiner, stride=1))
        assert set(labels.unique().tolist()) <= {0, 1, 255}, "an absent class got pixels"
        wrong[name] = ((labels != truth) & (labels != 255)).float().mean()
        assert (labels == 0).any()
        assert (labels == 1).any()
    assert wrong["refined"] <= wrong["plain"]


def test_batching_over_present_classes_changes_nothing():
    torch.manual_seed(0)
    image, cams = torch.rand(3, 3, 24, 20), torch.rand(3, 4, 24, 20)
    tags = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 1], [float("nan")] * 4])
    valid = torch.rand(3, 24, 20) > 0.1
    rule = LabelRule(refiner=SMALL)
    together = refined_labels(image, cams, tags, valid, rule)
    for index in range(3):
        one = slice(index, index + 1)
        alone = refined_labels(image[one], cams[one], tags[one], valid[one], rule)
        assert torch.equal(together[one], alone)


def test_without_a_tag_all_is_background():
    image, cams, tags = scene()
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :4] = False
    for refiner in (None, SMALL):
        labels = refined_labels(image, cams, 0 * tags, valid, LabelRule(refiner=refiner))
        assert (labels[valid] == 0).all()
        assert (labels[~valid] == 255).all()
    none = present_cams(cams, 0 * tags)
    assert (plain_labels(none, 0.4) == 0).all()
    assert (band_labels(none, 0.5, 0.3, valid)[valid] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_cams_give_no_nan(value):
    image, _, tags = scene()
    cams = torch.full((2, 2, 32, 32), value)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    flat = torch.full_like(image, 0.5)
    for guide in (image, flat):
        labels = refined_labels(guide, cams, tags, valid, LabelRule(refiner=SMALL))
        assert (labels == (1 if value else 0)).all()


def test_propagation_keeps_absent_classes_out_and_empty_boxes_empty():
    cams, tags = torch.rand(1, 2, 4, 4), torch.tensor([[1.0, 0.0]])
    spread = propagated_cams(cams, tags, torch.rand(1, 16, 16), 2, 0.4)
    assert (spread[:, 2] == 0).all()
    assert spread.isfinite().all()
    boxes = torch.tensor([[4, 4, 0, 8]])
    assert (refined_in_box(torch.rand(1, 3, 8, 8), spread, tags, boxes, LabelRule(refiner=SMALL)) == 0).all()


def test_labels_spread_along_the_affinity():
    """The CAM knows one cell of an object of two by four; affinity holds the object together."""
    cams, tags = torch.zeros(1, 2, 8, 8), torch.tensor([[1.0, 0.0]])
    cams[0, 0, 2, 2] = 1.0
    cams[0, 1] = 1.0  # of a class that is absent
    owned = torch.zeros(8, 8)
    owned[2:4, 2:6] = 1
    same = owned.flatten()[:, None] == owned.flatten()
    # Strong links inside the object; a background cell is linked with itself.
    affinity = torch.where(same & (owned.flatten() == 1), 1.0, torch.eye(64))[None]
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[:, :, 28:] = False
    rule = LabelRule(high=0.2, low=0.2, refiner=None)
    image = torch.rand(1, 3, 32, 32)
    alone = propagated_labels(image, cams, tags, valid, torch.eye(64)[None], 8, rule)
    spread = propagated_labels(image, cams, tags, valid, affinity, 8, rule)
    assert alone[0, 9:11, 9:11].eq(1).all()
    assert (alone[0, 9:15, 14:23] == 0).all()
    # The eight cells share what one of them had: the mean of their softmaxed scores.
    # With seven silent ones the background still wins.
    assert (spread[0, 8:16, 8:24] == 0).all()
    lower = LabelRule(high=-0.3, low=-0.3, refiner=None)
    found = propagated_labels(image, cams, tags, valid, affinity, 8, lower)
    assert found[0, 9:15, 9:23].eq(1).all()
    assert (found[0, :, 28:] == 255).all()
    assert not (found == 2).any()
    unknown = propagated_labels(image, cams, torch.tensor([[1.0, float("nan")]]), valid, affinity, 8, rule)
    assert not (unknown == 0).any()


@pytest.mark.parametrize("guide", ["rgb", "opponent"])
def test_what_lies_outside_the_image_changes_no_spread_label(guide):
    torch.manual_seed(0)
    image, cams, tags = torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8), torch.tensor([[1.0, 1.0]])
    valid = torch.zeros(1, 32, 32, dtype=torch.bool)
    valid[:, 4:24, :28] = True
    rule, affinity = LabelRule(refiner=SMALL, guide=guide), torch.eye(64)[None]
    first = propagated_labels(image, cams, tags, valid, affinity, 8, rule)
    other = torch.where(valid[:, None], image, torch.rand_like(image))
    assert torch.equal(propagated_labels(other, cams, tags, valid, affinity, 8, rule), first)
    assert (first[~valid] == 255).all()
    assert len(first[valid].unique()) > 1
    noise = propagated_labels(torch.rand_like(image), cams, tags, valid, affinity, 8, rule)
    assert not torch.equal(noise, first), "what lies inside does"


def test_nothing_is_background_where_tags_are_unknown():
    image, cams, tags = scene()
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    rule = LabelRule(refiner=SMALL)
    partly = tags.clone()
    partly[0, tags[0] == 0] = float("nan")
    for make in (refined_labels, sure_labels):
        known, found = make(image, cams, tags, valid, rule), make(image, cams, partly, valid, rule)
        assert (known[0] == 0).any()
        assert torch.equal(found[0], known[0].masked_fill(known[0] == 0, 255))
        assert torch.equal(found[1], known[1])
        assert (make(image, cams, torch.full_like(tags, float("nan")), valid, rule) == 255).all()


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_labels_of_an_image_of_one_row(size):
    image, cams, tags = torch.rand(1, 3, *size), torch.rand(1, 2, *size) / 2, torch.tensor([[1.0, 0.0]])
    for make in (refined_labels, sure_labels):
        labels = make(image, cams, tags, torch.ones(1, *size, dtype=torch.bool), LabelRule(refiner=SMALL))
        assert labels.shape == (1, *size)


def test_all_ignored_pairs_give_exactly_nothing():
    labels = torch.full((1, 16, 16), 255)
    pairs = affinity_labels(labels, (4, 4), 2)
    assert (pairs == 255).all()
    predicted = torch.rand(1, 16, 16, requires_grad=True)
    loss = affinity_loss(predicted, pairs)
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad.abs().sum() == 0
    with pytest.raises(UsageError, match="expected equal"):
        affinity_loss(predicted, pairs[:, :8])


def test_corrections_stay_within_the_tags():
    labels = torch.tensor([[[0, 1], [255, 255]]])
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 20  # the teacher believes in a class that the image does not have
    logits[0, 1] = torch.tensor([[9.0, 0.0], [9.0, 0.1]])  # and, among those it has, is sure of two pixels
    tags = torch.tensor([[float("nan"), 1, 0]])
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    assert corrected_labels(labels, logits, tags, valid, 0.9).tolist() == [[[1, 1], [1, 255]]]
    assert corrected_labels(labels, logits, 0 * tags, valid, 0.9).tolist() == [[[0, 0], [0, 0]]]
    assert (corrected_labels(labels, logits, tags, ~valid, 0.9) == 255).all()
    assert labels.tolist() == [[[0, 1], [255, 255]]]
    assert tags[0, 0].isnan()


def test_the_opponent_guide_is_the_runtimes():
    image = torch.randint(0, 256, (1, 5, 6, 3), dtype=torch.uint8)
    expected = make_guide(image, "opponent")
    torch.testing.assert_close(opponent_guide(image.permute(0, 3, 1, 2).float() / 255), expected)


@pytest.mark.parametrize("make", [refined_labels, sure_labels])
def test_the_refiner_sees_the_guide_that_the_rule_names(make, monkeypatch):
    image, cams = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32)
    given, seen = (image, cams, torch.ones(1, 1), torch.ones(1, 32, 32, dtype=torch.bool)), []
    monkeypatch.setattr(labels, "refine", lambda scores, guide, _: seen.append(guide) or scores)
    for guide in ("rgb", "opponent"):
        make(*given, LabelRule(refiner=SMALL, stride=1, guide=guide))
    torch.testing.assert_close(seen[0], image)
    torch.testing.assert_close(seen[1], opponent_guide(image))
