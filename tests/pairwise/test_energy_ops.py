"""The pair energy as an operator: gradients, registration, choice of the form, NaN, precision, messages."""

from __future__ import annotations

import itertools

import pytest
import torch

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import EnergyParameters, EnergyTerm, energy, energy_form, energy_ops, native

TERM = EnergyTerm(weight=0.7, xy_sigma=3.0)
SMALL = EnergyParameters(radius=2, terms=(TERM, EnergyTerm(weight=0.2)))


@pytest.fixture(params=["cpu", "torch"])
def form(request) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def data(batch=1, classes=3, height=4, width=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, rgb, deep, gates = (
        torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
        for channels in (classes, 3, 4, 2)
    )
    return p.softmax(1), [rgb, deep / 2], {"source": (gates[:, :1] > -1).to(dtype), "destination": gates[:, 1:] ** 2}


MATRICES = {"potts": None, "symmetric": [[0, 1, 2], [1, 0, 3], [2, 3, 0]], "any": [[0, 1, 2], [3, 0, 1], [1, 1, 0]]}


@pytest.mark.parametrize(("matrix", "one_way"), [*itertools.product(MATRICES, [False, True])])
def test_gradients(matrix, one_way, form):
    p, features, gates = data()
    m = None if MATRICES[matrix] is None else torch.tensor(MATRICES[matrix], dtype=torch.float64)
    parameters = SMALL.model_copy(update={"one_way": one_way})

    def value(p, *features):
        return energy(p, features, parameters, **gates, compatibility=m, form=form)

    inputs = [tensor.clone().requires_grad_() for tensor in (p, *features)]
    if one_way:
        # The neighbour counts as a constant, so only the features' gradient is the value's derivative.
        assert torch.autograd.gradcheck(lambda *f: value(p, *f), inputs[1:], fast_mode=True)
    else:
        assert torch.autograd.gradcheck(value, inputs, fast_mode=True)


def test_forward_mode_is_refused(form):
    p, features, gates = data()
    with pytest.raises(UsageError, match="forward mode; use backward"):
        torch.func.jvp(lambda given: energy(given, features, SMALL, **gates, form=form), (p,), (p,))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(form, wanted):
    p, features, gates = data()
    leaves = [f.requires_grad_(wanted) for f in features]
    arguments = (p.requires_grad_(), *gates.values(), None, leaves, [0, 1], [wanted] * 2, SMALL.to_json(), form, 1)
    torch.library.opcheck(energy_ops.pairwise_energy, arguments)


@pytest.mark.parametrize("one_way", [False, True])
def test_gradients_are_laid_out_as_the_fake_kernel_says(form, one_way):
    p, features, gates = (
        [part.to(memory_format=torch.channels_last) for part in parts]
        for parts in ([data()[0]], data()[1], data()[2].values())
    )
    text = SMALL.model_copy(update={"one_way": one_way}).to_json()
    _, towards, maps = energy_ops.pairwise_energy(*p, *gates, None, features, [0, 1], [True] * 2, text, form, 1)
    assert all(tensor.is_contiguous() for tensor in (towards, *maps))


def test_features_that_need_no_gradient_get_none(form):
    p, features, gates = data()
    features[1].requires_grad_()
    energy(p.requires_grad_(), features, SMALL, **gates, form=form).backward()
    assert p.grad is not None
    assert features[0].grad is None
    assert features[1].grad.abs().max() > 0
    assert not energy(p.detach(), [f.detach() for f in features], SMALL).requires_grad


def test_backward_can_run_twice_and_leaves_the_inputs_alone(form):
    p, features, gates = data()
    before = p.clone()
    value = energy(p.requires_grad_(), features, SMALL, **gates, form=form)
    value.backward(retain_graph=True)
    once = p.grad.clone()
    (3 * value).backward()
    torch.testing.assert_close(p.grad, 4 * once)
    assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(isa, dtype):
    """Wide enough for several strips, more classes than one group of accumulators."""
    p, features, gates = data(batch=2, classes=27, height=9, width=530, dtype=dtype)
    double = [f.double().requires_grad_() for f in features]
    reference = p.double().requires_grad_()
    expected = energy(reference, double, SMALL, **{n: g.double() for n, g in gates.items()}, form="torch")
    expected.backward()
    towards, grads = torch.empty_like(p), [torch.empty_like(f) for f in features]
    kernel = (SMALL, features, grads, [0, 1], [True, True])
    value = native.energy(p, p, tuple(gates.values()), towards, True, *kernel, 3, isa)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert value == pytest.approx(expected.item(), rel=tolerance)
    for found, leaf in zip((towards, *grads), (reference, *double), strict=True):
        assert (found - leaf.grad).abs().max() <= tolerance * leaf.grad.abs().max()


def test_wide_images_are_cut_into_strips_without_a_seam(form):
    """A window reaches over the borders of strips: every pixel of a flat image has the same neighbours."""
    p = torch.tensor([0.25, 0.75])[:, None, None].expand(1, 2, 12, 900).contiguous().requires_grad_()
    energy(p, [None], EnergyParameters(radius=5, terms=(TERM,)), form=form).backward()
    inner = p.grad[:, :, 5:-5, 5:-5]
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=1e-6, atol=0)


def test_a_nan_reaches_exactly_the_windows_that_hold_it(form):
    p, features, gates = data(height=9, width=40)
    gates["source"].zero_()  # 0 times NaN is NaN: a gate does not hide it
    p[0, 1, 4, 20] = torch.nan
    p.requires_grad_()
    value = energy(p, features, SMALL, **gates, form=form)
    value.backward()
    assert value.isnan()
    seen = p.grad.isnan().any(1)[0]
    expected = torch.zeros(9, 40, dtype=torch.bool)
    expected[2:7, 18:23] = True
    expected[4, 20] = False  # a pixel is no neighbour of its own
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_or_huge_feature_has_no_like(form, dtype):
    p, features, _ = data(height=5, width=20, dtype=dtype)
    features[0][0, 0, 2, 7], features[0][0, 1, 4, 15] = torch.inf, 1e30
    parameters = EnergyParameters(radius=2, terms=(TERM,))
    p.requires_grad_()
    value = energy(p, features[:1], parameters, form=form)
    value.backward()
    assert value.isfinite()
    assert p.grad.isfinite().all()
    assert not p.grad[0, :, 2, 7].any()
    assert not p.grad[0, :, 4, 15].any()


def test_a_nan_feature_reaches_its_windows_only(form):
    p, features, gates = data(height=9, width=40)
    features[1][0, 2, 4, 20] = torch.nan
    p.requires_grad_()
    energy(p, features, SMALL, **gates, form=form).backward()
    expected = torch.zeros(9, 40, dtype=torch.bool)
    expected[2:7, 18:23] = True
    assert torch.equal(p.grad.isnan().any(1)[0], expected)


def test_the_exponential_is_within_its_stated_error(compiled):
    """One pair per image and a kernel of features alone: the gradient is the kernel itself."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        distance = torch.linspace(0, 12, 4001, dtype=dtype)
        features = torch.zeros(4001, 1, 1, 2, dtype=dtype)
        features[:, 0, 0, 1] = distance
        p = torch.ones(4001, 1, 1, 2, dtype=dtype).requires_grad_()
        parameters = EnergyParameters(radius=1, terms=(EnergyTerm(weight=1.0),))
        energy(p, [features], parameters, form="cpu").backward()
        exact = (-(distance * distance).double() / 2).exp()
        assert ((p.grad[:, 0, 0, 0].double() / -2 / exact) - 1).abs().max() < bound


def test_the_choice_can_be_asked_for(compiled, monkeypatch):
    p = torch.rand(1, 2, 50, 4)
    assert energy_form(p, 5).name == "cpu"
    assert "instruction set" in energy_form(p, 5).reason
    assert energy_form(p.half(), 5).name == "torch"
    assert "on meta" in energy_form(p.to("meta"), 5).reason
    assert energy_form(p, 33).name == "torch"
    assert "33 pixels" in energy_form(p, 33).reason
    assert energy_form(p[:, :, :30], 99).name == "cpu"  # a window is never larger than the image
    with pytest.raises(UsageError, match="smaller radius"):
        energy_form(p, 33, "cpu")
    monkeypatch.setattr(native, "load", lambda: (None, "compiled kernels are not in this installation"))
    assert energy_form(p, 5).name == "torch"
    assert "not in this installation" in energy_form(p, 5).reason
    assert energy(p, [None], EnergyParameters(radius=1, terms=(TERM,))).isfinite()
    with pytest.raises(BackendError, match="install a C"):
        energy(p, [None], EnergyParameters(radius=1, terms=(TERM,)), form="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": torch.rand(4, 4)}, "expected floating point"),
        ({"probabilities": torch.rand(1, 0, 4, 5)}, "not empty"),
        ({"features": [None]}, "for 2 terms"),
        ({"features": [None, torch.rand(1, 3, 4, 6)]}, "feature 1 has shape"),
        ({"features": [None, torch.rand(1, 3, 4, 5).double()]}, "convert one"),
        ({"source": torch.ones(1, 2, 4, 5)}, "source has shape"),
        ({"destination": torch.ones(4, 5)}, "destination has shape"),
        ({"compatibility": torch.ones(2, 2)}, "compatibility is"),
        ({"form": "numpy"}, "torch tensors"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"probabilities": torch.rand(1, 3, 4, 5), "features": [None, None], "parameters": SMALL} | change
    with pytest.raises(UsageError, match=message):
        energy(**given)
