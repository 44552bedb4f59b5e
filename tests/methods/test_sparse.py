"""What methods for sparse labels share, and soft self-labelling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from training.losses import (
    absent_classes_loss,
    block_labels,
    collision_cross_entropy,
    partial_cross_entropy,
    soft_labels,
    spread_labels,
)
from training.methods import Batch, build_method
from training.methods.settings import MethodSettings
from wsss_deploy.card import Architecture, Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import build_network

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), stride=16)
CLASSES = 3
SPARSE = ("partial_ce", "gated_crf", "dfr", "soft_labels")

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed(nn.Module):
    """Gives the same logits whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits


def make(name, network=None, **options):
    settings = TypeAdapter(MethodSettings).validate_python({"name": name, **options})
    parts = () if network is None else (network.encoder, network.decoder)
    return build_method(settings, CLASSES, IMAGENET, None, *parts)


def batch(size=32):
    torch.manual_seed(0)
    image = F.interpolate(torch.randn(2, 3, 4, 4), size=(size, size))
    labels = torch.randint(0, CLASSES, (2, size, size))
    labels[torch.rand(2, size, size) >= 0.02] = 255
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[:, -6:] = False
    labels[~valid] = 255
    return Batch(image, labels, valid, torch.full((2, CLASSES), float("nan")), torch.ones(2, CLASSES, dtype=torch.bool))


def free_cells(labels):
    """Cells of four pixels a side without any label; where labels contradict there are some."""
    free = F.avg_pool2d((labels != 255).float(), 4) == 0
    assert (block_labels(labels, (8, 8))[~free] == 255).any()  # so that the two are told apart
    return free


@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_method_takes_both_sources(name):
    torch.manual_seed(0)
    network, average = (build_network(Architecture(encoder="test_vit", decoder_width=16), CLASSES) for _ in range(2))
    method = make(name, network, teacher={"threshold": 0.34}, spread={})
    method.set_teacher(average)
    assert {"teacher", "spread"} & set(method(network, batch(), 0.2)) == {"spread"}
    terms = method(network, batch(), 0.5)
    assert {"partial_ce", "teacher", "spread"} < set(terms) or name == "partial_ce"
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad is None for p in average.parameters())
    assert not any("teacher" in key for key in method.state_dict())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in average.parameters()}


def test_the_teachers_sure_classes_are_targets_on_unlabelled_pixels():
    data = batch()
    student, average = Fixed(torch.randn(2, CLASSES, 8, 8)), Fixed(4 * torch.randn(2, CLASSES, 8, 8))
    method = make("partial_ce", teacher={"weight": 0.5, "threshold": 0.8, "start": 0})
    method.set_teacher(average)
    found = method(student, data, 0.0)["teacher"]
    likely, predicted = average.logits.softmax(1).max(1)
    unlabelled = free_cells(data.labels)
    unlabelled[:, 6:] = False  # image rows 24 to 27 are two of padding, then padding alone
    counted = unlabelled & (likely >= 0.8)
    assert 0 < counted.sum() < unlabelled.sum()
    nll = F.cross_entropy(student.logits, predicted, reduction="none")
    torch.testing.assert_close(found, 0.5 * nll[counted].sum() / unlabelled.sum())
    assert not average.training


def test_a_refined_teacher_follows_the_images_edges():
    # Left and right differ in colour; the teacher's border between its two classes lies four pixels beside that edge.
    image = torch.full((1, 3, 64, 64), -1.0)
    image[..., 32:] = 1.0
    logits = torch.zeros(1, CLASSES, 16, 16)
    logits[:, 0, :, :9], logits[:, 1, :, 9:] = 4.0, 4.0
    labels = torch.full((1, 64, 64), 255)
    labels[:, :3] = 0
    data = Batch(
        image, labels, torch.ones(1, 64, 64, dtype=torch.bool), torch.zeros(1, CLASSES), torch.ones(1, CLASSES) > 0
    )
    data.valid[:, -5:] = False
    student = Fixed(torch.randn(1, CLASSES, 16, 16))
    method = make("partial_ce", teacher={"threshold": 0.7, "start": 0, "refine": True})
    method.set_teacher(Fixed(logits))
    found = method(student, data, 0.0)["teacher"]
    found.backward()
    assert student.logits.grad.abs().sum() > 0
    assert method.teacher.logits.grad is None
    # Pixels in question: all but labelled rows and padding; right of the edge class 1, left of it class 0.
    rows, raised = slice(3, 59), F.interpolate(student.logits, (64, 64), mode="bilinear")
    truth = torch.zeros(1, 64, 64, dtype=torch.long)
    truth[..., 32:] = 1
    expected = F.cross_entropy(raised[:, :, rows], truth[:, rows])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    # Unrefined, four columns are of the wrong class: far from that.
    plain = make("partial_ce", teacher={"threshold": 0.7, "start": 0})
    plain.set_teacher(Fixed(logits))
    shifted = plain(student, data, 0.0)["teacher"]
    assert (shifted - expected).abs() > 2 * (found - expected).abs()


def test_what_is_beyond_the_image_does_not_bleed_into_refined_labels():
    # A noisy image around the padding's colour, in which like colours are found in the padding.
    torch.manual_seed(0)
    image = 0.3 * torch.randn(1, 3, 64, 64)
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[:, 32:] = False
    image[:, :, 32:] = 0
    logits = torch.zeros(1, CLASSES, 16, 16)
    logits[:, 1, :8], logits[:, 0, 8:] = 5.0, 5.0
    data = Batch(image, torch.full((1, 64, 64), 255), valid, torch.zeros(1, CLASSES), torch.ones(1, CLASSES) > 0)
    method = make("partial_ce", teacher={"threshold": 0.7, "start": 0, "refine": True})
    method.set_teacher(Fixed(logits))
    raised = F.interpolate(logits, (64, 64), mode="bilinear").softmax(1)
    refined = method._refined(raised, data)[:, :, :32]
    assert (refined.argmax(1) == 1).all()
    assert (refined[:, 1, :28] > 0.8).all()
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 32, 64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("refine", [False, True])
def test_of_an_image_without_labels_nothing_is_known_to_be_absent(refine):
    data = batch()
    data.labels[1], data.labelled[1] = 255, False
    logits = torch.zeros(2, CLASSES, 8, 8)
    logits[:, 2] = 9.0
    student = Fixed(logits.clone())
    method = make("partial_ce", absent={}, teacher={"threshold": 0.8, "start": 0, "refine": refine})
    method.set_teacher(Fixed(logits))
    # The student agrees with the teacher, so that there is next to nothing to learn; of class 0 there would be.
    assert method(student, data, 0.0)["teacher"] < 0.01


def test_a_teacher_needs_an_average():
    method = make("gated_crf", teacher={})
    with pytest.raises(RecipeError, match=r"optimisation\.ema above 0"):
        method.set_teacher(None)
    plain = make("gated_crf")
    plain.set_teacher(None)
    plain.set_teacher(Fixed(torch.zeros(1)))
    assert plain.teacher is None


def test_carried_labels_are_targets_where_there_was_none():
    data, student = batch(), Fixed(torch.randn(2, CLASSES, 8, 8))
    own = {"weight": 0.5, "rgb": 2.0, "xy": 3.0, "limit": 0.7}
    found = make("partial_ce", spread=own)(student, data, 0.0)["spread"]
    seeds = block_labels(data.labels, (8, 8))
    carried = spread_labels(seeds, F.avg_pool2d(data.image, 4), 2.0, 3.0, 0.7)
    carried[~free_cells(data.labels)] = 255
    carried[:, 6:] = 255
    assert (carried != 255).any()
    torch.testing.assert_close(found, 0.5 * partial_cross_entropy(student.logits, carried))


@pytest.mark.parametrize(("progress", "on"), [(0.3, False), (0.31, True)])
def test_soft_labels_start_after_their_fraction(progress, on):
    terms = make("soft_labels")(Fixed(torch.randn(2, CLASSES, 8, 8)), batch(), progress)
    assert ("soft_labels" in terms) is on


def test_the_soft_label_term_is_collision_cross_entropy_with_the_sub_problems_solution():
    data, student = batch(), Fixed(torch.randn(2, CLASSES, 8, 8))
    found = make("soft_labels", steps=7, rate=0.2, potts=2.0)(student, data, 0.5)["soft_labels"]
    sigma, seeds = student.logits.softmax(1), block_labels(data.labels, (8, 8))
    inside = torch.ones(2, 8, 8, dtype=torch.bool)
    inside[:, 6:] = False
    y = soft_labels(
        sigma, seeds, F.avg_pool2d(data.image, 4), eta=0.3, strength=2.0, rgb=0.16,
        relaxation="collision_divergence", steps=7, rate=0.2, valid=inside,
    )  # fmt: skip
    free = inside & free_cells(data.labels)
    torch.testing.assert_close(found, 0.3 * collision_cross_entropy(y, sigma)[free].mean())
    found.backward()
    assert student.logits.grad[:, :, :6].abs().max() > 0
    assert student.logits.grad[:, :, 6:].abs().max() == 0


def test_classes_without_a_label_are_absent_from_image_and_teacher():
    data, student = batch(), Fixed(torch.randn(2, CLASSES, 8, 8))
    present = torch.tensor([[True, False, True], [False, True, False]])
    assert present.shape[1] == CLASSES
    data = replace(data, labelled=present)
    average = Fixed(4 * torch.randn(2, CLASSES, 8, 8))
    method = make("partial_ce", absent={"weight": 0.5}, teacher={"threshold": 0.8, "start": 0})
    method.set_teacher(average)
    terms = method(student, data, 0.0)
    inside = torch.ones(2, 8, 8, dtype=torch.bool)
    inside[:, 6:] = False
    torch.testing.assert_close(terms["absent"], 0.5 * absent_classes_loss(student.logits, present, inside))
    unlabelled = inside & free_cells(data.labels)
    # The second image has a single class, of which the teacher therefore is sure everywhere.
    likely = average.logits[0, [0, 2]].softmax(0)
    best, counted = torch.tensor([0, 2])[likely.argmax(0)], unlabelled[0] & (likely.amax(0) >= 0.8)
    nll = F.cross_entropy(student.logits, torch.stack([best, torch.ones_like(best)]), reduction="none")
    expected = (nll[0][counted].sum() + nll[1][unlabelled[1]].sum()) / unlabelled.sum()
    torch.testing.assert_close(terms["teacher"], expected)
