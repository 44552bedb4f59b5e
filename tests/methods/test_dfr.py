"""DFR: which terms act when, what moves what, and what is left out of the model."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from training.losses import Kernel, block_labels, feature_consistency_loss, gated_crf_loss
from training.methods import Batch, build_method
from training.methods.settings import MethodSettings
from wsss_deploy.card import Architecture, Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import build_network

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), stride=32)
CLASSES, SIZE = 3, 64
OPTIONS = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(decoder="mlp", encoder="test_convnext", network_options=None, **options):
    torch.manual_seed(0)
    architecture = Architecture(
        encoder=encoder, decoder=decoder, decoder_width=16, encoder_options=network_options or {}
    )
    network = build_network(architecture, CLASSES).eval()  # no dropout: terms can be compared
    settings = TypeAdapter(MethodSettings).validate_python({"name": "dfr", "head_width": 8, **options})
    return network, build_method(settings, CLASSES, IMAGENET, None, network.encoder, network.decoder)


def batch(labelled=0.1):
    torch.manual_seed(1)
    image = F.interpolate(torch.randn(2, 3, 8, 8), size=(SIZE, SIZE))
    labels = torch.randint(0, CLASSES, (2, SIZE, SIZE))
    labels[torch.rand(2, SIZE, SIZE) >= labelled] = 255
    valid = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    valid[:, 50:] = False
    labels[~valid] = 255
    return Batch(image, labels, valid, torch.full((2, CLASSES), float("nan")), torch.ones(2, CLASSES, dtype=torch.bool))


VARIANTS = [
    {},
    {"kernel": "product"},
    {"kernel": "product", "deep_weight": 0},
    {"shallow_weight": 0},
    {"deep_weight": 0},
    {"head_weight": 0},
    {"weight": 0},
    {"kernel_gradient": True},
    {"head_weight": 0, "kernel_gradient": True},
    {"dense": 8},
    {"gate": "confidence"},
    {"features": "last"},
    {"pairs": "labels"},
    {"pairs": "predictions", "threshold": 0.34},
    {"distance": "cosine"},
    {"detach": True},
    {"smooth_weight": 3},
    {"auxiliary_weight": 0.4},
    {"stride": 8},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_switch_trains(options):
    network, method = make(**options)
    terms = method(network, batch(), 0.5)
    assert all(term.ndim == 0 and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    used = [p for p in (*network.parameters(), *method.parameters())]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
    expected = {"partial_ce", "dfr", "consistency"}
    expected -= {"dfr"} if options.get("weight") == 0 else set()
    expected -= {"consistency"} if options.get("head_weight") == 0 else set()
    expected |= {"smoothness"} if "smooth_weight" in options else set()
    expected |= {"auxiliary"} if "auxiliary_weight" in options else set()
    assert set(terms) == expected
    assert bool(list(method.parameters())) == (options.get("head_weight") != 0)


@pytest.mark.parametrize("decoder", ["upernet", "mlp"])
def test_swin_as_in_the_paper_at_small_size(decoder):
    features = "decoder" if decoder == "upernet" else "stages"
    network, method = make(
        decoder, "swin_tiny_patch4_window7_224", OPTIONS, auxiliary_weight=0.4, features=features, head_width=64
    )
    terms = method(network.train(), batch(), 0.5)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in (*network.parameters(), *method.parameters()))


@pytest.mark.parametrize(
    ("progress", "terms", "kernels"),
    [
        (0.0, {"partial_ce", "consistency"}, 0),
        (0.005, {"partial_ce", "consistency"}, 0),
        (0.006, {"partial_ce", "consistency", "dfr"}, 1),
        (0.1, {"partial_ce", "consistency", "dfr"}, 1),
        (0.11, {"partial_ce", "consistency", "dfr"}, 2),
    ],
)
def test_the_warm_ups(progress, terms, kernels, monkeypatch):
    import training.methods.dfr as module

    seen = []
    monkeypatch.setattr(module, "gated_crf_loss", lambda *a, **k: seen.append(len(a[1])) or gated_crf_loss(*a, **k))
    network, method = make()
    assert set(method(network, batch(), progress)) == terms
    assert seen == ([kernels] if kernels else [])


def test_predicted_targets_come_after_the_warm_up():
    network, method = make(threshold=0.34)
    data = batch()
    before, after = (method(network, data, progress)["consistency"] for progress in (0.1, 0.2))
    assert abs(before - after) > 1e-4
    only_labels, _ = make(threshold=0.34), None
    labels = make(pairs="labels", threshold=0.34)[1]
    labels.load_state_dict(method.state_dict())
    torch.testing.assert_close(labels(network, data, 0.2)["consistency"], before)
    assert only_labels


def test_the_terms_are_the_losses():
    network, method = make(radius=3, weight=0.2, head_weight=0.7)
    data = batch()
    terms = method(network, data, 0.05)
    p = network(data.image).softmax(1)
    kernel = Kernel(1.0, {"xy": 6.0, "rgb": 0.1})
    expected = 0.2 * gated_crf_loss(p, [kernel], {"rgb": data.image}, 3, mask_src=data.valid[:, None])
    torch.testing.assert_close(terms["dfr"], expected)
    features = method.head(network.forward_features(data.image), (16, 16))
    targets = block_labels(data.labels, (16, 16))
    targets[:, 12:] = 255  # row 12 holds image rows 48 to 51, of which two are padding
    torch.testing.assert_close(terms["consistency"], 0.7 * feature_consistency_loss(features, targets, 4).total)


@pytest.mark.parametrize("gate", ["valid", "confidence"])
def test_the_dense_kernel_is_the_window_that_covers_the_map(gate):
    network, windowed = make(radius=16, gate=gate)
    dense = make(dense=16, gate=gate)[1]
    dense.load_state_dict(windowed.state_dict())
    data = batch()
    first, second = (method(network, data, 0.5)["dfr"] for method in (windowed, dense))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)
    gradients = [
        torch.autograd.grad(method(network, data, 0.5)["dfr"], list(network.decoder.parameters()), allow_unused=True)
        for method in (windowed, dense)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


def test_stop_gradients():
    """The regularised loss moves no head; the head's loss moves the network unless it is detached."""
    data = batch()
    network, method = make()
    terms = method(network, data, 0.5)
    assert not any(
        g is not None and g.abs().max() > 0
        for g in torch.autograd.grad(terms["dfr"], list(method.head.parameters()), retain_graph=True, allow_unused=True)
    )
    encoder = [p for p in network.encoder.parameters() if p.ndim > 1]
    assert torch.autograd.grad(terms["consistency"], encoder[0], retain_graph=True)[0].abs().max() > 0

    network, method = make(detach=True)
    terms = method(network, data, 0.5)
    assert torch.autograd.grad(terms["consistency"], encoder, retain_graph=True, allow_unused=True)[0] is None

    network, method = make(kernel_gradient=True)
    terms = method(network, data, 0.5)
    found = torch.autograd.grad(terms["dfr"], list(method.head.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in found)


def test_the_product_kernel_only_cuts_links():
    network, method = make(kernel="product")
    colour_alone = make(deep_weight=0)[1]
    colour_alone.load_state_dict(method.state_dict())
    both = make()[1]
    both.load_state_dict(method.state_dict())
    data = batch()
    product, shallow, total = (m(network, data, 0.5)["dfr"].item() for m in (method, colour_alone, both))
    assert product < shallow < total


def test_nothing_labelled_gives_no_nan():
    network, method = make(smooth_weight=1, auxiliary_weight=0.4)
    terms = method(network, batch(labelled=0.0), 0.5)
    sum(terms.values()).backward()
    assert terms["partial_ce"].item() == 0
    assert all(p.grad.isfinite().all() for p in (*network.parameters(), *method.parameters()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smooth_weight": 1, "head_weight": 0}, "leaves out"),
        ({"shallow_weight": 0, "deep_weight": 0}, "set weight: 0"),
        ({"kernel": "mean"}, "'sum' or 'product'"),
        ({"kernel": "product", "deep_weight": 0.25}, "found shallow_weight 1 and deep_weight 0.25"),
        ({"kernel": "product", "shallow_weight": 0}, "found shallow_weight 0 and deep_weight 1"),
        ({"dense": 16, "kernel_gradient": True}, "takes its kernel for a constant"),
        ({"threshold": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(MethodSettings).validate_python({"name": "dfr", **options})


def test_what_it_needs_of_the_network():
    with pytest.raises(RecipeError, match="decoder: upernet"):
        make(features="decoder")
    settings = TypeAdapter(MethodSettings).validate_python({"name": "dfr"})
    with pytest.raises(RecipeError, match="puts a head on the encoder"):
        build_method(settings, CLASSES, IMAGENET)
