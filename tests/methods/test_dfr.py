"""DFR: which terms act when, what moves what, and what is left out of the model."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from training.losses import (
    Kernel,
    block_labels,
    dense_pair_energy,
    feature_consistency_loss,
    feature_smoothness_loss,
    gated_crf_loss,
    partial_cross_entropy,
)
from training.methods import Batch, build_method
from training.methods.settings import MethodSettings
from wsss_deploy.card import Architecture, Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import build_network

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), stride=32)
CLASSES, SIZE = 3, 64
OPTIONS = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(decoder="mlp", encoder="test_convnext", network_options=None, preprocessing=IMAGENET, **options):
    torch.manual_seed(0)
    architecture = Architecture(
        encoder=encoder, decoder=decoder, decoder_width=16, encoder_options=network_options or {}
    )
    network = build_network(architecture, CLASSES).eval()  # no dropout: terms can be compared
    settings = TypeAdapter(MethodSettings).validate_python({"name": "dfr", "head_width": 8, **options})
    return network, build_method(settings, CLASSES, preprocessing, None, network.encoder, network.decoder)


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
    labels = make(pairs="labels", threshold=0.34)[1]
    labels.load_state_dict(method.state_dict())
    torch.testing.assert_close(labels(network, data, 0.2)["consistency"], before)


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


def by_hand(p, kernels, maps, radius, source, receivers):
    """Sum of d_i s_j K_ij (1 - <p_i, p_j>) over a window, from whole matrices of pairs."""
    height, width = p.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1).T.double()
    far = (grid[:, None] - grid).abs().amax(-1)
    total = torch.zeros((), dtype=torch.double)
    for n in range(len(p)):
        link = torch.zeros(len(grid), len(grid), dtype=torch.double)
        for weight, sigmas in kernels:
            exponent = torch.zeros_like(link)
            for name, sigma in sigmas.items():
                points = grid if name == "xy" else maps[name][n].flatten(1).T.double()
                exponent += (points[:, None] - points).square().sum(-1) / sigma**2
            link += weight * torch.exp(-exponent / 2)
        flat = p[n].flatten(1).double()
        gates = receivers[n].flatten().double()[:, None] * source[n].flatten().double()
        total += (gates * link * (1 - flat.T @ flat) * ((far > 0) & (far <= radius))).sum()
    return total


def maps_of(network, method, data, side):
    """Class probabilities, the kernel's maps and whole cells inside the image, at a side of so many pixels."""
    stride = SIZE // side
    p = F.adaptive_avg_pool2d(network(data.image).softmax(1), side)
    features = method.head(network.forward_features(data.image), (side, side))
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    maps = {"rgb": F.avg_pool2d(data.image, stride), "feat": unit}
    return p, maps, (F.avg_pool2d(data.valid[:, None].float(), stride) >= 1).float()


OWN = {"xy": 2.5, "rgb": 0.35, "feature": 0.3, "weight": 0.2, "radius": 3, "stride": 8}
SHALLOW, DEEP = {"xy": 2.5, "rgb": 0.35}, {"xy": 2.5, "feat": 0.3}


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"shallow_weight": 0.7, "deep_weight": 0.4}, [(0.7, SHALLOW), (0.4, DEEP)]),
        ({"shallow_weight": 0}, [(1.0, DEEP)]),
        ({"deep_weight": 0}, [(1.0, SHALLOW)]),
        ({"kernel": "product"}, [(1.0, SHALLOW | DEEP)]),
        ({"kernel": "product", "deep_weight": 0}, [(1.0, SHALLOW)]),
        ({"gate": "confidence", "shallow_weight": 0.7}, [(0.7, SHALLOW), (1.0, DEEP)]),
    ],
    ids=str,
)
def test_the_regularised_loss_is_that_of_its_settings(options, kernels):
    network, method = make(**OWN, **options)
    data = batch()
    p, maps, inside = maps_of(network, method, data, 8)
    # With either gate the padding sends nothing and is not counted.
    receivers = inside * (1 - p.amax(1, keepdim=True)) if options.get("gate") else torch.ones_like(inside)
    counted = (receivers if options.get("gate") else inside).sum()
    expected = 0.2 * by_hand(p, kernels, maps, 3, inside, receivers) / counted
    torch.testing.assert_close(method(network, data, 0.5)["dfr"].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gate", ["valid", "confidence"])
def test_a_dense_map_that_is_smaller_keeps_positions_in_pixels_of_the_larger(gate):
    options = {**OWN, "stride": 4}
    del options["radius"]
    network, method = make(**options, dense=8, gate=gate)
    data = batch()
    p, maps, inside = maps_of(network, method, data, 16)
    receivers = inside * (1 - p.amax(1, keepdim=True)) if gate == "confidence" else torch.ones_like(inside)
    p, receivers, *found = (F.avg_pool2d(m, 2) for m in (p, receivers, *maps.values()))
    inside = (F.avg_pool2d(inside, 2) >= 1).float()
    kernels = [(1.0, SHALLOW | {"xy": 1.25}), (1.0, DEEP | {"xy": 1.25})]
    total = by_hand(p, kernels, dict(zip(maps, found, strict=True)), 8, inside, receivers)
    counted = inside if gate == "valid" else receivers
    torch.testing.assert_close(
        method(network, data, 0.5)["dfr"].double(), 0.2 * total / counted.sum(), rtol=1e-4, atol=0
    )


def test_the_dense_kernel_has_its_gradient_and_keeps_no_pairs():
    torch.manual_seed(0)
    p = torch.rand(2, 3, 4, 5, dtype=torch.double).softmax(1).requires_grad_()
    rgb, gates = torch.randn(2, 3, 4, 5), torch.rand(2, 2, 1, 4, 5)
    kernels = (Kernel(0.7, {"xy": 2.0, "rgb": 1.0}),)
    assert torch.autograd.gradcheck(lambda q: dense_pair_energy(q, kernels, {"rgb": rgb}, *gates), p)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        dense_pair_energy(p, kernels, {"rgb": rgb}, *gates)
    assert max(kept) == p.numel()


def test_a_cell_whose_labels_contradict_has_no_target():
    network, method = make(threshold=0.34, pairs="both")
    data = batch(labelled=0.3)
    features = method.head(network.forward_features(data.image), (16, 16))
    likely, predicted = network(data.image).softmax(1).max(1)
    targets = block_labels(data.labels, (16, 16))
    free = F.avg_pool2d((data.labels != 255).float(), 4) == 0
    assert (free & (likely >= 0.34)).any()
    assert ((targets == 255) & ~free).any()
    targets = torch.where(free & (likely >= 0.34), predicted, targets)
    targets[:, 12:] = 255
    expected = 0.4 * feature_consistency_loss(features, targets, 4).total
    torch.testing.assert_close(method(network, data, 0.5)["consistency"], expected)


@pytest.mark.parametrize(("pairs", "distance"), [("predictions", "l1"), ("labels", "cosine")])
def test_the_heads_loss_is_that_of_its_settings(pairs, distance):
    data = batch()
    threshold = make()[0](data.image).softmax(1).amax(1).median().item()
    network, method = make(threshold=threshold, pairs=pairs, distance=distance, head_weight=0.7, head_radius=2)
    features = method.head(network.forward_features(data.image), (16, 16))
    targets = block_labels(data.labels, (16, 16))
    if pairs == "predictions":
        likely, predicted = network(data.image).softmax(1).max(1)
        targets = predicted.masked_fill(likely < threshold, 255)
        assert 0 < (targets == 255).sum() < targets.numel()
    targets[:, 12:] = 255
    expected = 0.7 * feature_consistency_loss(features, targets, 2, distance=distance).total
    torch.testing.assert_close(method(network, data, 0.5)["consistency"], expected)


def test_smoothness_and_auxiliary_head_have_their_factors():
    network, method = make(smooth_weight=3.0, auxiliary_weight=0.4, xy=2.5, rgb=0.35, head_radius=2)
    method.eval()  # the auxiliary head has a dropout
    data = batch()
    terms = method(network, data, 0.5)
    levels = network.forward_features(data.image)
    features, rgb = method.head(levels, (16, 16)), F.avg_pool2d(data.image, 4)
    inside = torch.ones(2, 16, 16, dtype=torch.bool)
    inside[:, 12:] = False
    smooth = feature_smoothness_loss(features, rgb, (Kernel(1.0, SHALLOW),), 2, inside)
    torch.testing.assert_close(terms["smoothness"], 3.0 * smooth)
    auxiliary = partial_cross_entropy(method.auxiliary(levels[-2]), data.labels)
    torch.testing.assert_close(terms["auxiliary"], 0.4 * auxiliary)


def test_colours_are_imagenets_whatever_the_encoders():
    own = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), stride=32)
    network, method = make(preprocessing=own, **OWN, deep_weight=0)
    data = batch()
    pixels = data.image * torch.tensor(own.std).view(3, 1, 1) + torch.tensor(own.mean).view(3, 1, 1)
    p, maps, inside = maps_of(network, method, data, 8)
    colours = (pixels - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)
    maps["rgb"] = F.avg_pool2d(colours, 8)
    expected = 0.2 * by_hand(p, [(1.0, SHALLOW)], maps, 3, inside, torch.ones_like(inside)) / inside.sum()
    torch.testing.assert_close(method(network, data, 0.5)["dfr"].double(), expected, rtol=1e-4, atol=0)


def test_the_head_on_the_decoders_map_moves_the_decoder():
    for detach in (False, True):
        network, method = make("upernet", features="decoder", detach=detach)
        loss = method(network, batch(), 0.5)["consistency"]
        found = torch.autograd.grad(loss, list(network.decoder.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in found) is not detach


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
        ({"smooth_weight": 1, "head_weight": 0}, "smooth_weight: without effect, head_weight: 0 leaves the head out"),
        ({"pairs": "labels", "head_weight": 0}, "pairs: without effect"),
        ({"detach": True, "head_weight": 0}, "detach: without effect"),
        ({"weight": 0, "head_weight": 0}, "nothing of DFR"),
        ({"weight": 0, "dense": 32, "gate": "confidence"}, "dense and gate: without effect, weight: 0 leaves"),
        ({"deep_weight": 0, "kernel_gradient": True}, "kernel_gradient: without effect, deep_weight: 0"),
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
