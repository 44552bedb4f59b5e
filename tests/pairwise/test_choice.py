from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import (
    GaussianTerm,
    MeanField,
    PairwiseParameters,
    affinity,
    choose,
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
        {"iterations": -1},
        {"unknown": 1},
    ],
)
def test_parameters_are_validated(settings):
    with pytest.raises(ValidationError):
        PairwiseParameters(**settings)


def test_parameters_survive_json(case):
    assert PairwiseParameters.model_validate_json(case.to_json()) == case
    assert hash(case) == hash(PairwiseParameters.model_validate_json(case.to_json()))


def test_importing_the_operator_does_not_import_torch():
    code = "import sys, wsss_deploy.pairwise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
