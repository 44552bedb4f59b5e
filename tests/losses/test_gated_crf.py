from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.losses import GatedCRFLoss, Kernel, gated_crf_loss
from wsss_deploy.errors import UsageError

TWO_KERNELS = (Kernel(0.7, {"xy": 2.0, "rgb": 0.8}), Kernel(0.3, {"depth": 0.5}))


def sample(n=2, c=4, h=6, w=7, scale=1, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    probabilities = torch.randn(n, c, h, w, dtype=dtype).softmax(1)
    modalities = {"rgb": torch.randn(n, 3, h * scale, w * scale, dtype=dtype)}
    modalities["depth"] = torch.randn(n, 1, h * scale, w * scale, dtype=dtype)
    return probabilities, modalities


def masks(n=2, h=6, w=7, seed=1):
    torch.manual_seed(seed)
    return {name: (torch.rand(n, 1, h, w) > 0.3).float() for name in ("mask_src", "mask_dst")}


def brute_force(probabilities, kernels, modalities, radius, s=None, d=None, matrix=None, padding=False):
    """The definition, pair by pair, in numpy."""
    p, maps = probabilities.numpy(), {name: value.numpy() for name, value in modalities.items()}
    (n, c, h, w), total = p.shape, 0.0
    zeros = {name: np.zeros(value.shape[1]) for name, value in maps.items()} | {"xy": np.zeros(2)}
    mu = np.ones((c, c)) - np.eye(c) if matrix is None else matrix.numpy()
    mu = mu * (c - 1) / np.maximum(mu.sum(1, keepdims=True), 1e-300)
    steps = [step for step in itertools.product(range(-radius, radius + 1), repeat=2) if step != (0, 0)]

    def features(b, y, x):
        return {name: value[b, :, y, x] for name, value in maps.items()} | {"xy": np.array([x, y], dtype=float)}

    for b, y, x in itertools.product(range(n), range(h), range(w)):
        for dy, dx in steps:
            v, u = y + dy, x + dx
            inside = 0 <= v < h and 0 <= u < w
            if not inside and not (padding and s is None and matrix is None):
                continue
            here, there = features(b, y, x), features(b, v, u) if inside else zeros
            affinity = sum(
                k.weight
                * math.exp(-sum(np.sum((here[m] - there[m]) ** 2) / sigma**2 for m, sigma in k.sigmas.items()) / 2)
                for k in kernels
            )
            gate = (1 if d is None else d[b, 0, y, x]) * (1 if s is None else s[b, 0, v, u] if inside else 0)
            total += gate * affinity * (p[b, :, y, x] @ mu @ p[b, :, v, u] if inside else 1)
    counted = d if d is not None else s
    return total / (n * h * w if counted is None else max(1, counted.sum()))


@pytest.mark.parametrize("radius", [1, 2, 9])
@pytest.mark.parametrize("gates", [(), ("mask_src",), ("mask_dst",), ("mask_src", "mask_dst")])
@pytest.mark.parametrize("form", ["potts", "padding", "matrix"])
def test_equals_the_definition(radius, gates, form):
    probabilities, modalities = sample(n=1, h=5, w=4)
    given = {name: mask for name, mask in masks(1, 5, 4).items() if name in gates}
    matrix = torch.rand(4, 4, dtype=torch.float64).fill_diagonal_(0) if form == "matrix" else None
    s, d = (None if name not in given else given[name].double().numpy() for name in ("mask_src", "mask_dst"))
    expected = brute_force(probabilities, TWO_KERNELS, modalities, radius, s, d, matrix, form == "padding")
    options = {"compatibility": matrix, "count_padding_pairs": form == "padding"}
    loss = gated_crf_loss(probabilities, TWO_KERNELS, modalities, radius, **given, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_gradients_to_probabilities_and_modalities(matrix, padding):
    probabilities, modalities = sample(n=1, c=3, h=4, w=3)
    gates = masks(1, 4, 3)
    if padding:
        del gates["mask_src"]
    compatibility = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0) if matrix else None
    options = {"compatibility": compatibility, "count_padding_pairs": padding, "kernel_gradient": True}

    def loss(p, rgb, depth):
        return gated_crf_loss(p, TWO_KERNELS, {"rgb": rgb, "depth": depth}, 2, **gates, **options)

    inputs = [value.requires_grad_() for value in (probabilities, modalities["rgb"], modalities["depth"])]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("matrix", [False, True])
def test_one_way_holds_the_neighbour_constant(matrix):
    p, modalities = sample(n=1, c=3, h=4, w=5)
    gates = masks(1, 4, 5)
    mu = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0) if matrix else None
    kernel = Kernel(1.3, {"xy": 2.0, "rgb": 0.9})
    options = {**gates, "compatibility": mu}
    loss = gated_crf_loss(p.requires_grad_(), [kernel], modalities, 2, **options, one_way=True)
    (found,) = torch.autograd.grad(loss, p)

    ys, xs = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    position = torch.stack([xs, ys]).flatten(1).T.double()
    colour = modalities["rgb"][0].flatten(1).T
    features = torch.cat([position / 2, colour / 0.9], dim=1)
    dense = 1.3 * torch.exp(-(torch.cdist(features, features) ** 2) / 2)
    dense = dense * (torch.cdist(position, position, p=float("inf")) <= 2) * (1 - torch.eye(20))
    flat = p[0].flatten(1).T
    table = 1 - torch.eye(3).double() if mu is None else 2 * mu / mu.sum(1, keepdim=True)
    # With Potts, 1 - <p_i, p_j> is meant, which differs from the matrix form by a constant per pixel in the gradient.
    pairs = 1 - flat @ flat.detach().T if mu is None else flat @ table @ flat.detach().T
    s, d = (gates[name].flatten().double() for name in ("mask_src", "mask_dst"))
    reference = (d[:, None] * s * dense * pairs).sum() / d.sum()
    (expected,) = torch.autograd.grad(reference, p)
    torch.testing.assert_close(loss, reference, rtol=1e-9, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    two_way = gated_crf_loss(p, [kernel], modalities, 2, **options)
    torch.testing.assert_close(loss, two_way, rtol=1e-12, atol=0)


def test_a_whole_number_matrix_is_potts():
    probabilities, modalities = sample()
    matrix = 1 - torch.eye(4, dtype=torch.int64)
    found = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, compatibility=matrix)
    expected = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_function_equals_module():
    probabilities, modalities = sample()
    gates = masks()
    module = GatedCRFLoss(TWO_KERNELS, 2)
    expected = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, **gates)
    assert torch.equal(module(probabilities, modalities, **gates), expected)
    assert "0.7 exp(xy: 2, rgb: 0.8) + 0.3 exp(depth: 0.5), radius=2" in repr(module)
    assert not module.state_dict()


def test_kernels_are_constants_unless_asked_for():
    probabilities, modalities = sample()
    modalities["rgb"].requires_grad_()
    probabilities.requires_grad_()
    gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2).backward()
    assert modalities["rgb"].grad is None
    assert probabilities.grad.abs().sum() > 0


def test_inputs_are_never_modified():
    probabilities, modalities = sample()
    gates = masks()
    gates["mask_src"][0, 0, 0, 0] = float("nan")
    gates["mask_dst"][0, 0, 1, 1] = 0.5
    matrix = torch.rand(4, 4).fill_diagonal_(0)
    tensors = [probabilities, *modalities.values(), *gates.values(), matrix]
    before = [tensor.clone() for tensor in tensors]
    own = {"rgb": lambda maps, size: maps, "mask": lambda maps, size: maps}
    # One modality in two kernels and an identity down-sampler: the release divides by sigma in place, twice.
    kernels = [Kernel(1.0, {"rgb": 0.5}), Kernel(1.0, {"rgb": 2.0, "depth": 1.0})]
    gated_crf_loss(probabilities, kernels, modalities, 2, **gates, compatibility=matrix, downsamplers=own)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(-1), copy.nan_to_num(-1))


@pytest.mark.parametrize("name", ["mask_src", "mask_dst"])
def test_an_empty_mask_gives_exact_zeros(name):
    probabilities, modalities = sample()
    probabilities.requires_grad_()
    loss = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, **{name: torch.zeros(2, 1, 6, 7)})
    loss.backward()
    assert loss.item() == 0
    assert not probabilities.grad.any()


def test_nan_and_partial_mask_values_are_zero():
    probabilities, modalities = sample()
    clean = masks()["mask_src"]
    dirty = torch.where(clean == 0, torch.tensor(float("nan")), clean)
    dirty[1] = torch.where(clean[1] == 0, torch.tensor(0.99), clean[1])
    losses = [gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, mask_src=mask) for mask in (clean, dirty)]
    assert torch.equal(*losses)


def test_larger_modalities_and_masks_are_averaged_whole_cells_count():
    probabilities, modalities = sample(scale=4)
    full = torch.ones(2, 1, 24, 28, dtype=torch.bool)
    full[0, 0, 5, 9] = False
    cells = torch.ones(2, 1, 6, 7)
    cells[0, 0, 1, 2] = 0
    small = {name: F.adaptive_avg_pool2d(maps, (6, 7)) for name, maps in modalities.items()}
    expected = gated_crf_loss(probabilities, TWO_KERNELS, small, 2, mask_src=cells)
    loss = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, mask_src=full)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_own_downsamplers_are_used():
    probabilities, modalities = sample(scale=3)
    nearest = {name: (lambda maps, size: F.interpolate(maps, size)) for name in ("rgb", "mask")}
    full = torch.zeros(2, 1, 18, 21)
    full[..., ::3, ::3] = 1
    small = {"rgb": modalities["rgb"][..., ::3, ::3], "depth": F.avg_pool2d(modalities["depth"], 3)}
    expected = gated_crf_loss(probabilities, TWO_KERNELS, small, 2, mask_src=torch.ones(2, 1, 6, 7))
    loss = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2, mask_src=full, downsamplers=nearest)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    probabilities, modalities = sample(dtype=torch.float32)
    # As sharp as in training, but with a sum far above what float16 holds.
    kernels = [Kernel(1000.0, {"xy": 6.0})]
    p = probabilities.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gated_crf_loss(p, kernels, modalities, 3, compatibility=1 - torch.eye(4))
    expected = gated_crf_loss(p.detach().float(), kernels, modalities, 3, compatibility=1 - torch.eye(4))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert p.grad.dtype == dtype
    assert p.grad.isfinite().all()


def test_confident_predictions_lose_nothing_to_cancellation():
    p = torch.zeros(1, 3, 16, 16)
    p[:, 1] = 1
    p.requires_grad_()
    image = {"rgb": torch.rand(1, 3, 16, 16)}
    loss = gated_crf_loss(p, [Kernel(1.0, {"xy": 6.0, "rgb": 0.3})], image, 5)
    assert loss.item() == 0


def test_equal_calls_are_bitwise_equal():
    probabilities, modalities = sample(n=2, c=7, h=32, w=32, dtype=torch.float32)
    results = []
    for _ in range(2):
        p = probabilities.clone().requires_grad_()
        loss = gated_crf_loss(p, TWO_KERNELS, modalities, 5)
        loss.backward()
        results.append((loss.detach(), p.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_samples_are_independent():
    probabilities, modalities = sample()
    alone = [
        gated_crf_loss(probabilities[i : i + 1], TWO_KERNELS, {k: v[i : i + 1] for k, v in modalities.items()}, 2)
        for i in range(2)
    ]
    together = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 2)
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_tiny_maps(height, width):
    probabilities, modalities = sample(n=1, h=height, w=width)
    loss = gated_crf_loss(probabilities, TWO_KERNELS, modalities, 5)
    assert loss.item() == pytest.approx(brute_force(probabilities, TWO_KERNELS, modalities, 5), rel=1e-12)


def peak_bytes(function):
    """Largest sum of live allocations while `function` runs, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("kernel_gradient", [False, True])
def test_memory_does_not_grow_with_the_window(kernel_gradient):
    n, c, size, radius = 1, 21, 96, 5
    p = torch.rand(n, c, size, size).softmax(1).requires_grad_()
    image = torch.rand(n, 3, size, size, requires_grad=True)
    mask = torch.ones(n, 1, size, size)

    def run(radius):
        kernels = [Kernel(1.0, {"xy": 6.0, "rgb": 0.1})]
        loss = gated_crf_loss(p, kernels, {"rgb": image}, radius, mask_src=mask, kernel_gradient=kernel_gradient)
        loss.backward()

    map_bytes = n * c * size * size * 4
    unfold_bytes = map_bytes * (2 * radius + 1) ** 2
    peak = peak_bytes(lambda: run(radius))
    assert peak < 12 * map_bytes
    assert peak < unfold_bytes / 8
    assert peak < 1.3 * peak_bytes(lambda: run(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probabilities": torch.rand(4, 6, 7)}, r"shape \(4, 6, 7\); expected floating point \(N, C, H, W\)"),
        ({"probabilities": torch.ones(2, 4, 6, 7, dtype=torch.int64)}, "int64"),
        ({"probabilities": torch.rand(0, 4, 6, 7)}, "not empty"),
        ({"kernels": []}, "at least one"),
        ({"kernels": [Kernel(1.0, {"thermal": 1.0})]}, "modality 'thermal', given are: depth, rgb"),
        ({"radius": 0}, "radius is 0; expected 1 or more"),
        ({"modalities": {"rgb": torch.rand(2, 3, 9, 7), "depth": torch.rand(2, 1, 6, 7)}}, "'rgb' is 9x7, .* 6x7"),
        ({"modalities": {"rgb": torch.rand(2, 3, 12, 28), "depth": torch.rand(2, 1, 6, 7)}}, "same whole stride"),
        ({"modalities": {"rgb": torch.rand(1, 3, 6, 7), "depth": torch.rand(2, 1, 6, 7)}}, "expected 2 maps"),
        ({"modalities": {"xy": torch.rand(2, 2, 6, 7)}}, "'xy' or 'mask' are reserved"),
        ({"mask_src": torch.ones(2, 6, 7)}, r"a mask has shape \(2, 6, 7\); expected \(2, 1, height, width\)"),
        ({"mask_dst": torch.ones(2, 1, 3, 7)}, "'mask' is 3x7"),
        ({"compatibility": torch.ones(3, 3)}, r"\(3, 3\); expected \(4, 4\)"),
        ({"compatibility": torch.eye(4)}, "non-zero diagonal"),
        ({"compatibility": torch.eye(4) - 1}, "negative"),
        ({"downsamplers": {"rgb": lambda maps, size: maps[..., :-1]}}, "the down-sampler of 'rgb' gave"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    probabilities, modalities = sample(dtype=torch.float32)
    values = {"probabilities": probabilities, "kernels": TWO_KERNELS, "modalities": modalities, "radius": 2} | changes
    with pytest.raises(UsageError, match=words):
        gated_crf_loss(**values)


@pytest.mark.parametrize(
    ("weight", "sigmas", "words"),
    [
        (0.0, {"xy": 1.0}, "weight is 0.0"),
        (1.0, {"xy": -1.0}, "sigma of 'xy' is -1.0"),
        (float("nan"), {"xy": 1.0}, "finite number above 0"),
        (1.0, {}, "no modality"),
    ],
)
def test_bad_kernels(weight, sigmas, words):
    with pytest.raises(UsageError, match=words):
        Kernel(weight, sigmas)
