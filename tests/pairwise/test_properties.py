"""What holds for any image and any masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsss_deploy.pairwise import GaussianTerm, PairwiseParameters, affinity, refine

FORMS = ["cpu", "numpy"]
QUICK = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
TERM = GaussianTerm(sigma_xy=4.0, sigma_rgb=0.2)


@pytest.fixture(params=FORMS)
def form(request) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


@st.composite
def problems(draw):
    """Parameters and a random image with few colours, so that flat patches and ties are common."""
    kind = draw(st.sampled_from(["par", "varm", "gaussian"]))
    dilations = tuple(sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=3))))
    parameters = PairwiseParameters(
        kind=kind,
        dilations=dilations,
        iterations=draw(st.integers(1, 3)),
        normalise=draw(st.booleans()),
        terms=(TERM,) if kind == "gaussian" else (),
    )
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 256]))
    guide = rng.integers(0, levels, (2, draw(st.integers(1, 4)), height, width)) / levels
    return parameters, guide, rng.random((2, draw(st.integers(1, 4)), height, width))


def stated_sum(parameters, weights):
    if parameters.kind == "gaussian":
        return weights.sum(1) if not parameters.normalise else (weights.sum(1) > 0).astype(float)
    if parameters.normalise:
        return np.ones_like(weights[:, 0])
    return np.full_like(weights[:, 0], 1.01 if parameters.kind == "par" else 0.99)


@QUICK
@given(problem=problems())
def test_weights_sum_as_stated_and_constant_masks_stay_constant(problem, form):
    parameters, guide, masks = problem
    weights = affinity(guide, parameters, form=form)
    expected = stated_sum(parameters, weights)
    np.testing.assert_allclose(weights.sum(1), expected, rtol=1e-9, atol=1e-12)
    if parameters.kind != "gaussian":
        out = refine(np.full_like(masks, 0.25), guide, parameters, form=form)
        factor = (expected**parameters.iterations)[:, None]
        np.testing.assert_allclose(out, np.broadcast_to(0.25 * factor, out.shape), rtol=1e-9)


@QUICK
@given(problem=problems(), data=st.data())
def test_permuting_classes_commutes_and_a_batch_is_a_loop(problem, data, form):
    parameters, guide, masks = problem
    out = refine(masks, guide, parameters, form=form)
    order = data.draw(st.permutations(range(masks.shape[1])))
    np.testing.assert_array_equal(refine(masks[:, order], guide, parameters, form=form), out[:, order])
    for n in range(2):
        one = refine(masks[n : n + 1], guide[n : n + 1], parameters, form=form)
        np.testing.assert_array_equal(one, out[n : n + 1])


@QUICK
@given(problem=problems(), axis=st.sampled_from([2, 3]))
def test_mirroring_the_image_mirrors_the_result(problem, axis, form):
    parameters, guide, masks = problem
    if parameters.kind == "varm":
        return  # its forward differences are not symmetric, by definition
    out = refine(masks, guide, parameters, form=form)
    mirrored = refine(np.flip(masks, axis), np.flip(guide, axis), parameters, form=form)
    np.testing.assert_allclose(np.flip(mirrored, axis), out, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_masks_reach_the_neighbours_and_no_further(case, scene, value, form):
    if case.mean_field:
        pytest.skip("a softmax over classes spreads it to all of them")
    case = case.model_copy(update={"iterations": 1, "dilations": (1, 3), "radius": None})
    data = scene(dtype=np.float32, height=15, width=15)
    clean = refine(data.masks, data.guide, case, form=form)
    data.masks[0, 1, 7, 7] = value
    out = refine(data.masks, data.guide, case, form=form)
    touched = np.zeros(out.shape, bool)
    for dy, dx in case.offsets:
        touched[0, 1, 7 - dy, 7 - dx] = True
    # Infinity times a weight that underflowed to 0 is NaN; either way it is not finite.
    assert not np.isfinite(out[touched]).any()
    np.testing.assert_array_equal(out[~touched], clean[~touched])


def test_nan_in_the_guide_makes_all_weights_nan_that_see_it(case, scene, form):
    if case.kind == "gaussian":
        pytest.skip("each weight depends on two pixels only")
    case = case.model_copy(update={"dilations": (1, 3)})
    data = scene(dtype=np.float32, height=15, width=15)
    data.guide[0, 0, 7, 7] = np.nan
    weights = affinity(data.guide, case, form=form)
    for dy, dx in (*case.offsets, (0, 0)):
        assert np.isnan(weights[0, :, 7 - dy, 7 - dx]).all()
    assert np.isfinite(weights[1]).all()
    assert np.isfinite(weights[0, :, 0, 0]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 255.0, 1e6, 1e15])
def test_weights_stay_finite_at_any_scale_of_the_guide(scene, scale, form):
    data = scene(dtype=np.float32)
    guide = (data.guide * np.float32(scale)).astype(np.float32)
    for kind in ("par", "varm"):
        weights = affinity(guide, PairwiseParameters(kind=kind, dilations=(1, 2)), form=form)
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights.sum(1), 1.01 if kind == "par" else 0.99, rtol=1e-5)
