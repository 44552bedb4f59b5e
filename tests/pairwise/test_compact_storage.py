"""Weights and masks in 16 bits: close to the full result where they fit, the very same where they do not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import GaussianTerm, MeanField, PairwiseParameters, native, refine
from wsss_deploy.refinement import DEFAULT, STRONG

PAR = PairwiseParameters(dilations=(1, 2, 5), iterations=10, normalise=True)
PUBLISHED = PAR.model_copy(update={"normalise": False})
GAUSSIAN = PairwiseParameters(
    kind="gaussian", dilations=(1, 3), iterations=6, normalise=True, terms=(GaussianTerm(sigma_rgb=0.2),)
)


@pytest.fixture
def probabilities(scene):
    """scene() with smoothly varying, confident class probabilities."""

    def make(**options):
        data = scene(dtype=np.float32, **options)
        powers = np.exp(8 * data.masks)
        data.masks = powers / powers.sum(1, keepdims=True)
        return data

    return make


@pytest.fixture(params=["avx2", "avx512"])
def small(request, compiled) -> str:
    """An instruction set that stores 16 bits."""
    tiny = np.zeros((1, 8, 2, 2), np.float32)
    try:
        native.affinity(PairwiseParameters(dilations=(1,)), tiny[:, :1], tiny, 1, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def run(parameters, data, isa, threads=1, compact=True):
    out = np.empty_like(data.masks)
    native.refine(parameters, data.masks, data.guide, None, out, threads, isa, compact)
    return out


@pytest.mark.parametrize("parameters", [PAR, PUBLISHED, GAUSSIAN], ids=["par", "published", "gaussian"])
@pytest.mark.parametrize("classes", [1, 3, 12, 25])
def test_it_agrees_with_the_full_result(probabilities, small, parameters, classes):
    data = probabilities(height=61, width=83, channels=4, classes=classes)
    full, compact = (run(parameters, data, small, compact=kind) for kind in (False, True))
    assert 0 < np.abs(compact - full).max() < 5e-4
    best = np.sort(full, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-3 if classes > 1 else np.ones_like(full[:, 0], bool)
    assert clear.mean() > 0.5
    assert (compact.argmax(1) == full.argmax(1))[clear].all()
    np.testing.assert_allclose(compact.sum(1), full.sum(1), atol=1e-3)


def test_a_flat_area_keeps_its_value(small):
    # All weights are equal there, so rounding moves all of them the same way; a step would scale by as much.
    masks = np.full((1, 2, 40, 40), 0.7, np.float32)
    masks[:, 1] = 0.3
    guide = np.full((1, 3, 40, 40), 0.5, np.float32)
    out = np.empty_like(masks)
    native.refine(PAR, masks, guide, None, out, 1, small, True)
    np.testing.assert_allclose(out, masks, atol=2e-5)


def test_any_number_of_threads_gives_the_same_bits(probabilities, small):
    data = probabilities(height=97, width=19)
    one = run(PAR, data, small)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(run(PAR, data, small, threads), one)


def test_no_pixel_alike_leaves_nothing(probabilities, small):
    data = probabilities(height=20, width=33)
    data.guide[:, :, 7, 11] = 50
    out = run(GAUSSIAN, data, small)
    assert (out[:, :, 7, 11] == 0).all()
    np.testing.assert_allclose(out, run(GAUSSIAN, data, small, compact=False), atol=5e-4)


@pytest.mark.parametrize("value", [1.01, -0.01, np.nan, np.inf])
def test_masks_that_do_not_fit_are_computed_in_full(probabilities, isa, value):
    data = probabilities(height=30, width=41)
    data.masks[-1, -1, -1, -1] = value
    for threads in (1, 3):
        np.testing.assert_array_equal(run(PAR, data, isa, threads), run(PAR, data, isa, compact=False))


@pytest.mark.parametrize(
    "parameters",
    [
        PAR.model_copy(update={"dilations": (1,), "iterations": 101}),
        PAR.model_copy(update={"kind": "varm"}),
        GAUSSIAN.model_copy(update={"normalise": False}),
        PUBLISHED.model_copy(update={"second_weight": 0.3}),
    ],
    ids=["many steps", "negative weights", "sums above 1", "masks that grow"],
)
def test_parameters_that_do_not_fit_are_computed_in_full(probabilities, isa, parameters):
    data = probabilities(height=30, width=41)
    np.testing.assert_array_equal(run(parameters, data, isa), run(parameters, data, isa, compact=False))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_guide_that_is_not_finite_is_computed_in_full(probabilities, isa, value):
    data = probabilities(height=30, width=41)
    data.guide[-1, 0, 11, 17] = value
    full = run(PAR, data, isa, compact=False)
    assert np.isnan(full).any() or value == 1e30
    for threads in (1, 3):
        np.testing.assert_allclose(run(PAR, data, isa, threads), full, atol=5e-4)


def test_the_most_steps_stay_close(small, scene):
    data = scene(height=60, width=70, dtype=np.float32)
    parameters = PAR.model_copy(update={"dilations": (1,), "iterations": 100})
    np.testing.assert_allclose(run(parameters, data, small), run(parameters, data, small, compact=False), atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("share", "most"), [(0.01, 45), (0.003, 71), (0.1, 10)])
def test_masks_that_grow_stay_close_as_long_as_they_are_stored_so(small, seed, share, most):
    """A nearly flat guide, where all weights are rounded alike, and hard masks: the worst that has been found."""
    rng = np.random.default_rng(seed)
    masks = (rng.random((1, 2, 30, 30)) > 0.3).astype(np.float32)
    guide = (rng.integers(0, 3, (1, 3, 30, 30)) / 255).astype(np.float32)
    data = SimpleNamespace(masks=masks, guide=guide)
    for steps, stored in ((most, True), (most + 1, False), (100, False)):
        parameters = PairwiseParameters(dilations=(4,), iterations=steps, second_weight=share)
        full, compact = (run(parameters, data, small, compact=kind) for kind in (False, True))
        assert (np.abs(compact - full).max() > 0) == stored
        np.testing.assert_allclose(compact, full, rtol=0, atol=1e-3)


@pytest.mark.parametrize("parameters", [PairwiseParameters(), DEFAULT.parameters, STRONG.parameters])
def test_what_is_usual_is_stored_so(probabilities, small, parameters):
    data = probabilities(height=61, width=83)
    assert not np.array_equal(run(parameters, data, small), run(parameters, data, small, compact=False))


def test_a_mean_field_is_computed_in_full(probabilities, compiled):
    data = probabilities()
    parameters = GAUSSIAN.model_copy(update={"mean_field": MeanField(compatibility=2.0)})
    found = (refine(data.masks, data.guide, parameters, storage=kind) for kind in ("compact", "full"))
    np.testing.assert_array_equal(*found)


def test_the_public_function_takes_it_for_both_libraries(probabilities, compiled):
    data = probabilities(height=45, width=61)
    guide, masks = torch.from_numpy(data.guide), torch.from_numpy(data.masks)
    found = refine(data.masks, data.guide, PAR, form="cpu", storage="compact")
    np.testing.assert_array_equal(refine(masks, guide, PAR, form="cpu", storage="compact").numpy(), found)
    full = refine(data.masks, data.guide, PAR, form="cpu")
    np.testing.assert_allclose(found, full, atol=5e-4)
    # Where there is a gradient, and in float64, nothing is rounded.
    np.testing.assert_array_equal(refine(masks.requires_grad_(), guide, PAR, storage="compact").detach(), full)
    double = data.masks.astype(np.float64), data.guide.astype(np.float64)
    np.testing.assert_array_equal(refine(*double, PAR, storage="compact"), refine(*double, PAR))
    with pytest.raises(UsageError, match="expected 'full' or 'compact'"):
        refine(data.masks, data.guide, PAR, storage="half")
