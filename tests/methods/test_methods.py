from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from training.losses import Kernel, class_weights_from_counts, gated_crf_loss, partial_cross_entropy
from training.methods import Batch, build_method
from training.methods.settings import MethodSettings
from wsss_deploy.card import Preprocessing
from wsss_deploy.errors import RecipeError

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), stride=16)
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), stride=16)
ALL = ("supervised", "partial_ce", "gated_crf")
CLASSES = 3


class Network(nn.Module):
    """Stands for a SegmentationNetwork: logits at a quarter of the image's size."""

    def __init__(self, stride=4):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(3, CLASSES, stride, stride=stride)

    def forward(self, image):
        return self.layer(image)


class Fixed(nn.Module):
    """Gives the same logits whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits


def make(name, preprocessing=IMAGENET, counts=None, **options):
    settings = TypeAdapter(MethodSettings).validate_python({"name": name, **options})
    return build_method(settings, CLASSES, preprocessing, counts)


def normalise(values, preprocessing):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (values - mean) / std


def batch(labelled=0.1, preprocessing=IMAGENET, size=32, valid_rows=None):
    torch.manual_seed(0)
    values = F.interpolate(torch.rand(2, 3, 8, 8), size=(size, size))
    labels = torch.randint(0, CLASSES, (2, size, size))
    labels[torch.rand(2, size, size) >= labelled] = 255
    valid = torch.ones(2, size, size, dtype=torch.bool)
    if valid_rows is not None:
        valid[:, valid_rows:] = False
    return Batch(
        normalise(values, preprocessing),
        labels,
        valid,
        torch.full((2, CLASSES), float("nan")),
        torch.ones(2, CLASSES, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", ALL)
def test_terms_train_the_network(name):
    network, method = Network(), make(name)
    terms = method(network, batch(), 0.5)
    assert all(term.ndim == 0 and term.isfinite() and term > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert network.layer.weight.grad.abs().sum() > 0
    assert not list(method.parameters())
    assert not method.state_dict()


def test_cross_entropy_terms_are_the_loss_on_the_labels():
    network, data = Network(), batch()
    expected = partial_cross_entropy(network(data.image), data.labels)
    assert torch.equal(make("supervised")(network, data, 0.0)["ce"], expected)
    assert torch.equal(make("partial_ce")(network, data, 0.0)["partial_ce"], expected)
    assert torch.equal(make("gated_crf")(network, data, 0.5)["partial_ce"], expected)


def test_the_pairwise_term_is_the_weighted_loss():
    network, data = Network(), batch()
    kernels = [{"weight": 0.9, "xy": 5, "rgb": 0.2}, {"weight": 0.1, "xy": 3, "rgb": None}]
    found = make("gated_crf", weight=0.3, radius=3, kernels=kernels)(network, data, 0.5)["gated_crf"]
    typed = [Kernel(0.9, {"xy": 5.0, "rgb": 0.2}), Kernel(0.1, {"xy": 3.0})]
    p = network(data.image).softmax(1)
    expected = 0.3 * gated_crf_loss(p, typed, {"rgb": data.image}, 3, mask_src=data.valid[:, None])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("start", "progress", "on"), [(0.2, 0.2, False), (0.2, 0.21, True), (0.0, 0.0, True)])
def test_the_pairwise_term_starts_after_its_fraction(start, progress, on):
    terms = make("gated_crf", start=start)(Network(), batch(), progress)
    assert ("gated_crf" in terms) is on


def test_the_published_start_is_the_default():
    method = make("gated_crf")
    assert "gated_crf" not in method(Network(), batch(), 450 / 90_000)
    assert "gated_crf" in method(Network(), batch(), 451 / 90_000)


@pytest.mark.parametrize("name", ALL)
def test_nothing_labelled_gives_no_nan(name):
    network = Network()
    terms = make(name, counts=(5, 0, 1), class_weights="counts")(network, batch(labelled=0.0), 0.5)
    total = sum(terms.values())
    total.backward()
    cross_entropy = [value for key, value in terms.items() if key != "gated_crf"]
    assert [value.item() for value in cross_entropy] == [0.0]
    assert total.isfinite()
    assert network.layer.weight.grad.isfinite().all()


def test_nothing_valid_gives_no_nan():
    network = Network()
    terms = make("gated_crf")(network, batch(valid_rows=0), 0.5)
    assert terms["gated_crf"].item() == 0
    sum(terms.values()).backward()
    assert network.layer.weight.grad.isfinite().all()


def test_a_sigma_means_the_same_with_every_encoder():
    network = Fixed(torch.randn(2, CLASSES, 8, 8))
    losses = [
        make("gated_crf", preprocessing)(network, batch(preprocessing=preprocessing), 0.5)["gated_crf"]
        for preprocessing in (IMAGENET, HALF)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    wrong = make("gated_crf", IMAGENET)(network, batch(preprocessing=HALF), 0.5)["gated_crf"]
    assert abs(wrong / losses[0] - 1) > 0.05


@pytest.mark.parametrize("gate", [True, False])
def test_padding_is_gated_as_a_source(gate):
    network, data = Fixed(torch.randn(2, CLASSES, 8, 8)), batch(valid_rows=22)
    found = make("gated_crf", weight=1.0, gate_validity=gate)(network, data, 0.5)["gated_crf"]
    sources = torch.ones(2, 1, 8, 8)
    sources[:, :, 5:] = 0  # row 5 holds image rows 20 to 23, of which two are padding
    kernel, p = Kernel(1.0, {"xy": 6.0, "rgb": 0.1}), network.logits.softmax(1)
    gated, bare = (gated_crf_loss(p, [kernel], {"rgb": data.image}, 5, mask_src=mask) for mask in (sources, None))
    torch.testing.assert_close(found, gated if gate else bare)
    assert abs(gated - bare) > 0.01 * bare


def test_labelled_pixels_can_be_left_out():
    network = Fixed(torch.randn(2, CLASSES, 8, 8))
    data = batch(labelled=0.0)
    data.labels[:, 9, 14] = 1
    found = make("gated_crf", weight=1.0, gate_labelled=True)(network, data, 0.5)["gated_crf"]
    receivers = torch.ones(2, 1, 8, 8)
    receivers[:, :, 2, 3] = 0
    masks = {"mask_src": data.valid[:, None], "mask_dst": receivers}
    kernel = Kernel(1.0, {"xy": 6.0, "rgb": 0.1})
    expected = gated_crf_loss(network.logits.softmax(1), [kernel], {"rgb": data.image}, 5, **masks)
    torch.testing.assert_close(found, expected)


MATRIX = ((0.0, 1.0, 2.0), (1.0, 0.0, 0.5), (0.1, 1.0, 0.0))


@pytest.mark.parametrize(
    "options",
    [{"one_way": True}, {"compatibility": MATRIX}, {"gate_validity": False, "count_padding_pairs": True}],
    ids=lambda options: next(reversed(options)),
)
def test_the_losss_own_switches_reach_it(options):
    network, data = Fixed(torch.randn(2, CLASSES, 8, 8)), batch()
    found = make("gated_crf", weight=1.0, **options)(network, data, 0.5)["gated_crf"]
    (slope,) = torch.autograd.grad(found, network.logits)
    given = {key: value for key, value in options.items() if key != "gate_validity"}
    if "compatibility" in given:
        given["compatibility"] = torch.tensor(MATRIX)
    mask = None if options.get("gate_validity") is False else data.valid[:, None]
    arguments = ([Kernel(1.0, {"xy": 6.0, "rgb": 0.1})], {"rgb": data.image}, 5)
    expected = gated_crf_loss(network.logits.softmax(1), *arguments, mask_src=mask, **given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, network.logits)[0])
    plain = gated_crf_loss(network.logits.softmax(1), *arguments, mask_src=mask)
    changes_the_value = "one_way" not in options
    assert bool((plain - expected).abs() > 1e-3 * plain) is changes_the_value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count_padding_pairs": True}, "counts nothing with gate_validity"),
        ({"compatibility": ((0.0, 1.0), (1.0,))}, "square list"),
        ({"compatibility": ((0.0, 1.0), (1.0, 0.5))}, "zeros on its diagonal"),
        ({"compatibility": ((0.0, 1.0), (0.0, 0.0))}, "switches the loss off"),
    ],
)
def test_switches_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        make("gated_crf", **options)


def test_a_crops_padding_does_not_shrink_the_loss_of_the_rest():
    network, data = Fixed(torch.randn(2, CLASSES, 8, 8)), batch(labelled=0.0, valid_rows=16)
    on, off = (make("gated_crf", gate_labelled=gate)(network, data, 0.5)["gated_crf"] for gate in (True, False))
    # With nothing labelled the gate leaves only the padding out, which without it receives a little.
    assert 0.8 * off < on <= off


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_map_on_which_the_loss_acts_has_the_asked_stride(stride):
    network = Fixed(torch.randn(2, CLASSES, 8, 8))
    method = make("gated_crf", stride=stride)
    seen = []
    method.gated_crf.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert method(network, batch(), 0.5)["gated_crf"] > 0
    assert seen[0].shape == (2, CLASSES, 32 // stride, 32 // stride)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(2, 32 // stride, 32 // stride))


@pytest.mark.parametrize("name", ALL)
def test_class_weights_come_from_counts(name):
    network, data, counts = Network(), batch(), (90, 9, 1)
    terms = make(name, counts=counts, class_weights="counts")(network, data, 0.0)
    expected = partial_cross_entropy(network(data.image), data.labels, class_weights_from_counts(counts))
    torch.testing.assert_close(next(iter(terms.values())), expected)


@pytest.mark.parametrize(("counts", "found"), [(None, "found none"), ((1, 2), "found 2")])
def test_class_weights_without_counts(counts, found):
    with pytest.raises(RecipeError, match=f"3 classes, {found}"):
        make("partial_ce", counts=counts, class_weights="counts")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "gated_crf", "wieght": 1}, "Extra inputs"),
        ({"name": "gated_crf", "weight": 0}, "greater than 0"),
        ({"name": "gated_crf", "start": 1}, "less than 1"),
        ({"name": "gated_crf", "kernels": []}, "at least 1 item"),
        ({"name": "gated_crf", "kernels": [{"xy": None, "rgb": None}]}, "give at least one width"),
        ({"name": "partial_ce", "weight": 1}, "Extra inputs"),
        ({"name": "magic"}, "'supervised', 'partial_ce', 'gated_crf'"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(MethodSettings).validate_python(values)


@pytest.mark.parametrize("name", ALL)
def test_settings_survive_the_recipe_file(name):
    adapter = TypeAdapter(MethodSettings)
    settings = adapter.validate_python({"name": name})
    assert adapter.validate_json(settings.model_dump_json()) == settings
