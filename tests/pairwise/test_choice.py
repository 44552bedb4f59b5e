from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import (
    EnergyTerm,
    GaussianTerm,
    MeanField,
    PairwiseParameters,
    affinity,
    choose,
    cuda_source,
    forms,
    native,
    refine,
    step,
)

SMALL = PairwiseParameters(dilations=(1,), iterations=1)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "compiled kernels are not in this installation"))


def test_compiled_kernels_are_preferred_with_their_instruction_set(compiled):
    assert choose("auto", is_torch=True).name == "cpu"
    assert "instruction set" in choose("auto", is_torch=False).reason


def test_without_kernels_the_plain_forms_run_and_say_why(without_kernels):
    for is_torch, name in ((True, "torch"), (False, "numpy")):
        form = choose("auto", is_torch=is_torch)
        assert form.name == name
        assert "not in this installation" in form.reason
    assert "compiler" in forms()[0].reason
    data = np.ones((1, 1, 4, 4), np.float32)
    np.testing.assert_allclose(refine(data, data, SMALL), 1.01, rtol=1e-6)


def test_a_missing_form_asked_for_by_name_is_an_error_with_the_remedy(without_kernels):
    with pytest.raises(BackendError, match="install a C"):
        refine(np.ones((1, 1, 4, 4)), np.ones((1, 1, 4, 4)), SMALL, form="cpu")


def test_tensors_elsewhere_and_of_half_precision_take_the_plain_form():
    assert choose("auto", is_torch=True, device="meta").name == "torch"
    assert "meta" in choose("auto", is_torch=True, device="meta").reason
    assert choose("auto", is_torch=True, dtype="float16").name == "torch"
    many = choose("auto", is_torch=True, device="cuda:0", neighbours=1088)
    assert (many.name, many.reason) == ("torch", "there are 1088 neighbours, its kernels take 256")
    with pytest.raises(UsageError, match="float16"):
        choose("cpu", is_torch=True, dtype="float16")


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((np.ones((1, 1, 4, 4)), np.ones((1, 3, 4, 4))), {"form": "gpu"}, "no form 'gpu'"),
        ((np.ones((1, 1, 4, 4)), np.ones((1, 3, 4, 4))), {"form": "torch"}, "numpy arrays"),
        ((np.ones((4, 4)), np.ones((1, 3, 4, 4))), {}, "axes"),
        ((np.ones((1, 1, 4, 4), np.uint8), np.ones((1, 3, 4, 4))), {}, "floating"),
        ((np.ones((1, 1, 4, 4), np.float32), np.ones((1, 3, 4, 4))), {}, "convert"),
        ((np.ones((2, 1, 4, 4)), np.ones((1, 3, 4, 4))), {}, "batch"),
        ((np.ones((1, 0, 4, 4)), np.ones((1, 3, 4, 4))), {}, "empty"),
        ((np.ones((1, 1, 4, 4)), torch.ones((1, 3, 4, 4), dtype=torch.float64)), {}, "both be numpy"),
    ],
)
def test_wrong_arguments_are_named(arrays, options, message):
    with pytest.raises(UsageError, match=message):
        refine(*arrays, SMALL, **options)


def test_step_checks_weights_and_unary():
    masks = np.ones((1, 2, 4, 4))
    weights = affinity(masks, SMALL)
    with pytest.raises(UsageError, match="neighbours"):
        step(masks, weights[:, :4], SMALL)
    with pytest.raises(UsageError, match="both or neither"):
        step(masks, weights, SMALL, masks)
    with pytest.raises(UsageError, match="both or neither"):
        step(masks, weights, SMALL.model_copy(update={"mean_field": MeanField()}))


@pytest.mark.parametrize(
    "settings",
    [
        {"dilations": ()},
        {"dilations": (1, 1)},
        {"dilations": (0,)},
        {"kind": "gaussian"},
        {"terms": (GaussianTerm(sigma_xy=1.0),)},
        {"kind": "gaussian", "terms": (GaussianTerm(sigma_xy=1.0),), "bandwidth": 0.3},
        {"bandwidth": 0.0},
        {"bandwidth": 1e-155},
        {"bandwidth": 1e200},
        {"bandwidth": float("nan")},
        {"iterations": -1},
        {"unknown": 1},
    ],
)
def test_parameters_are_validated(settings):
    with pytest.raises(ValidationError):
        PairwiseParameters(**settings)


@pytest.mark.parametrize("name", ["sigma_xy", "sigma_rgb", "sigma_features"])
@pytest.mark.parametrize("value", [0.0, 1e-200, 1e-25, 1e155, float("inf"), float("nan")])
def test_widths_whose_square_is_no_number_are_refused(name, value):
    with pytest.raises(ValidationError, match=rf"{name}\n.*(0\.000001|1000000) "):
        GaussianTerm(**{name: value})
    if name == "sigma_xy":
        with pytest.raises(ValidationError, match=r"xy_sigma\n.*(0\.000001|1000000|finite number) "):
            EnergyTerm(weight=1.0, xy_sigma=value)


@pytest.mark.parametrize("settings", [{"weight": 1e300}, {"weight": -1.0}])
def test_factors_that_are_no_float32_are_refused(settings):
    with pytest.raises(ValidationError):
        GaussianTerm(sigma_xy=1.0, **settings)
    with pytest.raises(ValidationError):
        MeanField(compatibility=settings["weight"])
    with pytest.raises(ValidationError):
        MeanField(epsilon=1e-50)


BOUNDS = [
    *(PairwiseParameters(kind=kind, dilations=(1, 3), bandwidth=b) for kind in ("par", "varm") for b in (1e-6, 1e6)),
    *(
        PairwiseParameters(kind="gaussian", radius=1, terms=(GaussianTerm(weight=weight, **{name: sigma}),))
        for name in ("sigma_xy", "sigma_rgb", "sigma_features")
        for sigma in (1e-6, 1e6)
        for weight in (1.0, 1e6)
    ),
]


@pytest.mark.parametrize("parameters", BOUNDS)
def test_numbers_at_the_bounds_are_numbers_in_every_form(parameters, scene, compiled):
    data = scene(height=9, width=11, dtype=np.float32)
    data.guide[0, :, 4, 4] += np.float32(1e-3)  # flat but for this
    guide = torch.from_numpy(data.guide)
    found = [affinity(data.guide, parameters, form=form) for form in ("cpu", "numpy")]
    for weights in (*found, affinity(guide, parameters, form="torch").numpy()):
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights, found[0], rtol=1e-4, atol=1e-6)
    constants = re.findall(r"([\d.infa]+(?:e[+-]\d+)?)f\b", cuda_source.definitions(parameters))
    assert np.isfinite(np.array([float(number) for number in constants]).astype(np.float32)).all()


@pytest.mark.parametrize("form", ["auto", "numpy"])
def test_a_guide_without_the_features_of_a_term_is_refused(form):
    terms = (GaussianTerm(sigma_rgb=0.1), GaussianTerm(sigma_features=0.5))
    parameters = PairwiseParameters(kind="gaussian", dilations=(1,), terms=terms, iterations=1)
    image = np.random.default_rng(0).random((1, 3, 5, 6))
    for function in (
        lambda: affinity(image, parameters, form=form),
        lambda: refine(image, image, parameters, form=form),
    ):
        with pytest.raises(UsageError, match=r"sigma_features 0.5, .*has 3: its shape is \(1, 3, 5, 6\); append"):
            function()
    with pytest.raises(UsageError, match="append the features"):
        refine(torch.from_numpy(image), torch.from_numpy(image), parameters)
    # Of the colour's channels the guide may have some only.
    colour = parameters.model_copy(update={"terms": terms[:1]})
    grey = affinity(image[:, :1], colour, form=form)
    np.testing.assert_allclose(grey, affinity(image[:, [0, 0, 0]] / 3**0.5, colour, form=form))


def test_parameters_survive_json(case):
    assert PairwiseParameters.model_validate_json(case.to_json()) == case
    assert hash(case) == hash(PairwiseParameters.model_validate_json(case.to_json()))


def test_importing_the_operator_does_not_import_torch():
    code = "import sys, wsss_deploy.pairwise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
