"""A faster form is never a different result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import (
    GaussianTerm,
    PairwiseParameters,
    affinity,
    native,
    numpy_form,
    reference,
    refine,
    step,
)

SIZES = [(1, 1), (1, 40), (7, 3), (16, 16), (33, 65), (5, 600)]


def both(scene):
    return torch.from_numpy(scene.guide), torch.from_numpy(scene.masks)


def test_numpy_equals_torch(case, scene):
    data = scene()
    guide, masks = both(data)
    np.testing.assert_allclose(
        refine(data.masks, data.guide, case, form="numpy"),
        refine(masks, guide, case, form="torch"),
        rtol=1e-10,
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_compiled_equals_reference_at_every_size(case, scene, compiled, height, width):
    data = scene(height=height, width=width)
    expected = reference.refine(*reversed(both(data)), case)
    np.testing.assert_allclose(refine(data.masks, data.guide, case, form="cpu"), expected, rtol=1e-9, atol=1e-12)
    weights = affinity(data.guide, case, form="cpu")
    np.testing.assert_allclose(weights, reference.affinity(both(data)[0], case), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 11, 12, 13, 24, 25, 49])
def test_compiled_takes_any_number_of_classes(scene, isa, classes):
    parameters = PairwiseParameters(dilations=(1, 2), iterations=2)
    data = scene(classes=classes, channels=1, dtype=np.float32)
    out = np.empty_like(data.masks)
    native.refine(parameters, data.masks, data.guide, None, out, 1, isa)
    np.testing.assert_allclose(out, numpy_form.refine(data.masks, data.guide, parameters), rtol=2e-5, atol=1e-7)


def test_fused_refinement_equals_affinity_and_steps(case, scene, isa):
    data = scene(dtype=np.float32)
    unary = numpy_form.unary_of(data.masks, case)
    fused, masks = np.empty_like(data.masks), data.masks
    native.refine(case, data.masks, data.guide, unary, fused, 2, isa)
    weights = np.empty((2, len(case.offsets), *masks.shape[2:]), np.float32)
    native.affinity(case, data.guide, weights, 2, isa)
    for _ in range(case.iterations):
        out = np.empty_like(masks)
        native.step(case, masks, weights, unary, out, 2, isa)
        masks = out
    np.testing.assert_array_equal(fused, masks)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("dilations", "iterations"), [((1, 2), 7), ((1, 5), 10)])
def test_several_steps_in_one_pass_equal_steps_in_turn(scene, isa, threads, dilations, iterations):
    # Tall enough that every thread goes on some steps ahead of its neighbours, and not all.
    parameters = PairwiseParameters(dilations=dilations, iterations=iterations)
    data = scene(height=97, width=19, channels=4, dtype=np.float32)
    fused, masks = np.empty_like(data.masks), data.masks
    native.refine(parameters, data.masks, data.guide, None, fused, threads, isa)
    weights = np.empty((len(masks), len(parameters.offsets), *masks.shape[2:]), np.float32)
    native.affinity(parameters, data.guide, weights, 1, isa)
    for _ in range(iterations):
        out = np.empty_like(masks)
        native.step(parameters, masks, weights, None, out, 1, isa)
        masks = out
    np.testing.assert_array_equal(fused, masks)


@pytest.mark.parametrize("threads", [2, 3, 7, 64])
def test_any_number_of_threads_gives_the_same_bits(case, scene, compiled, threads):
    data = scene(dtype=np.float32)
    one = refine(data.masks, data.guide, case, form="cpu", threads=1)
    np.testing.assert_array_equal(refine(data.masks, data.guide, case, form="cpu", threads=threads), one)


def test_numpy_and_torch_enter_the_kernels_alike(case, scene, compiled):
    data = scene(dtype=np.float32)
    guide, masks = both(data)
    from_torch = refine(masks, guide, case, form="cpu").numpy()
    if case.mean_field is None:
        np.testing.assert_array_equal(from_torch, refine(data.masks, data.guide, case, form="cpu"))
    else:  # torch's logarithm and numpy's differ in the last bit
        np.testing.assert_allclose(from_torch, refine(data.masks, data.guide, case, form="cpu"), rtol=1e-5)


LAYOUTS = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "every other column": lambda tensor: tensor.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_taken_as_they_are_meant(case, scene, compiled, layout):
    guide, masks = both(scene(height=20, width=23))
    strided = [LAYOUTS[layout](tensor) for tensor in (masks, guide)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    weights, unary = reference.affinity(guide, case), reference.unary_of(masks, case)
    for form in ("cpu", "torch"):
        torch.testing.assert_close(refine(*strided, case, form=form), refine(masks, guide, case, form=form))
        torch.testing.assert_close(affinity(strided[1], case, form=form), weights)
        given = [LAYOUTS[layout](tensor) for tensor in (masks, weights)]
        found = step(*given, case, None if unary is None else LAYOUTS[layout](unary), form=form)
        torch.testing.assert_close(found, reference.step(masks, weights, case, unary))
    arrays = [tensor.numpy() for tensor in strided]
    for form in ("cpu", "numpy"):
        expected = refine(masks.numpy(), guide.numpy(), case, form=form)
        np.testing.assert_allclose(refine(*arrays, case, form=form), expected, rtol=1e-12)


def test_one_image_for_a_whole_batch(case, scene, compiled):
    """An expanded axis has stride 0."""
    guide, masks = both(scene(batch=3))
    guide = guide[:1]
    for form in ("cpu", "torch"):
        expected = refine(masks, guide.repeat(3, 1, 1, 1), case, form=form)
        torch.testing.assert_close(refine(masks, guide.expand(3, -1, -1, -1), case, form=form), expected)
        expected = refine(masks[:1].repeat(3, 1, 1, 1), guide.repeat(3, 1, 1, 1), case, form=form)
        expanded = [tensor[:1].expand(3, -1, -1, -1) for tensor in (masks, guide)]
        torch.testing.assert_close(refine(*expanded, case, form=form), expected)
    arrays = [
        np.broadcast_to(tensor[:1].numpy(), expected_shape)
        for tensor, expected_shape in ((masks, masks.shape), (guide, (3, *guide.shape[1:])))
    ]
    for form in ("cpu", "numpy"):
        np.testing.assert_allclose(refine(*arrays, case, form=form), expected, rtol=1e-10)


def test_inputs_are_not_changed(case, scene):
    data = scene()
    before = data.masks.copy(), data.guide.copy()
    for form in ("auto", "numpy"):
        refine(data.masks, data.guide, case, form=form)
    np.testing.assert_array_equal(data.masks, before[0])
    np.testing.assert_array_equal(data.guide, before[1])


def test_no_iterations_give_the_resized_masks(scene):
    data = scene(height=16, width=24)
    small = np.ascontiguousarray(data.masks[:, :, ::4, ::3])
    parameters = PairwiseParameters(iterations=0)
    expected = reference.resize(torch.from_numpy(small), 16, 24)
    for form in ("auto", "numpy"):
        np.testing.assert_allclose(refine(small, data.guide, parameters, form=form), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_use_the_plain_form(case, scene, dtype):
    data = scene(height=9, width=9)
    guide, masks = (part.to(dtype) for part in both(data))
    out = refine(masks, guide, case)
    assert out.dtype == dtype
    expected = refine(masks.double(), guide.double(), case)
    assert (out.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_half_precision_arrays(case, scene):
    data = scene(height=9, width=9)
    guide, masks = data.guide.astype(np.float16), data.masks.astype(np.float16)
    out = refine(masks, guide, case)
    assert out.dtype == np.float16
    expected = refine(masks.astype(np.float64), guide.astype(np.float64), case)
    np.testing.assert_allclose(out, expected, atol=0.005 * expected.max())


@pytest.mark.parametrize("kind", ["par", "varm"])
def test_a_channel_whose_neighbours_are_all_the_same_says_nothing(kind, isa):
    """Only its centre differs: its contrast of 1e12 is every neighbour's, and must not swallow the other channels."""
    rng = np.random.default_rng(3)
    guide = rng.random((1, 3, 9, 9)).astype(np.float32)
    guide[:, 2] = 0.3
    guide[:, 2, 4, 4] += np.float32(1 / 255)
    parameters = PairwiseParameters(kind=kind, dilations=(1,), second_weight=0.0)
    without = guide[:, :2]
    # The mean over channels has a third one that is 0 everywhere.
    plain = parameters.model_copy(update={"bandwidth": parameters.contrast * (3 / 2) ** 0.5})
    expected = numpy_form.affinity(without.astype(np.float64), plain)[:, :, 4, 4]
    assert expected.max() > 0.2
    compiled = np.empty((1, 8, 9, 9), np.float32)
    native.affinity(parameters, guide, compiled, 1, isa)
    torch_form = reference.affinity(torch.from_numpy(guide), parameters).numpy()
    for found in (compiled, numpy_form.affinity(guide, parameters), torch_form):
        np.testing.assert_allclose(found[:, :, 4, 4], expected, atol=1e-5)


def test_a_lone_pixel_does_not_round_its_neighbours_away(isa):
    """They differ by less than a digit of the difference to it, and are not all the same."""
    rng = np.random.default_rng(5)
    guide = rng.random((1, 3, 9, 9)).astype(np.float32)
    guide[:, 0] = np.float32(0.01) + rng.integers(0, 2, (9, 9)).astype(np.float32) * np.float32(2e-9)
    guide[:, 0, 4, 4] = 1.0
    parameters = PairwiseParameters(dilations=(1, 2))
    expected = reference.affinity(torch.from_numpy(guide), parameters).numpy()
    assert expected[0, :, 4, 4].std() < 0.02, "this channel outweighs the others"
    compiled = np.empty((1, 16, 9, 9), np.float32)
    native.affinity(parameters, guide, compiled, 1, isa)
    for found in (compiled, numpy_form.affinity(guide, parameters)):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("value", "weight"), [(1.36, 1.0), (1.315, 0.01), (1.2, 1e-30)])
def test_gaussians_at_the_end_of_the_numbers(compiled, value, weight):
    """A lone pixel whose weights are hardly numbers: the same in every form, their sum 1 or all 0."""
    guide, masks = np.zeros((1, 1, 9, 9), np.float32), np.full((1, 2, 9, 9), 0.5, np.float32)
    guide[0, 0, 4, 4] = value
    term = GaussianTerm(weight=weight, sigma_rgb=0.1)
    parameters = PairwiseParameters(kind="gaussian", dilations=(1,), terms=(term,), normalise=True, iterations=1)
    found = {form: refine(masks, guide, parameters, form=form)[0, :, 4, 4] for form in ("cpu", "numpy")}
    found["torch"] = refine(torch.from_numpy(masks), torch.from_numpy(guide), parameters, form="torch")[0, :, 4, 4]
    for values in found.values():
        np.testing.assert_allclose(values, 0.0 if value > 1.33 or weight < 1e-20 else 0.5, atol=1e-3)


def test_what_is_not_finite_reaches_the_same_pixels(compiled):
    parameters = PairwiseParameters(kind="varm", dilations=(2,), iterations=1)
    masks = np.full((1, 1, 13, 13), 0.5, np.float32)
    for place in ((6, 11), (11, 11), (12, 12), (0, 6)):
        guide = np.random.default_rng(0).random((1, 3, 13, 13)).astype(np.float32)
        guide[0, 1, *place] = np.nan
        found = [np.isnan(refine(masks, guide, parameters, form=form)) for form in ("cpu", "numpy")]
        np.testing.assert_array_equal(*found)
        assert found[0].any()


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 1e17), (np.float64, 1e150)])
def test_guides_of_large_values_give_numbers(case, compiled, dtype, largest):
    """Up to the documented limit. (Not the same numbers: rounding decides which of equal variations is less.)"""
    wide = case.model_copy(update={"radius": 12, "iterations": 1})
    for parameters in (case, wide):
        guide = (np.random.default_rng(0).choice([-1.0, 0.1, 1.0], (1, 4, 9, 11)) * largest).astype(dtype)
        found = [affinity(guide, parameters, form=form) for form in ("cpu", "numpy")]
        for weights in (*found, affinity(torch.from_numpy(guide), parameters, form="torch").numpy()):
            assert np.isfinite(weights).all()


def test_an_empty_batch(case, compiled):
    masks, guide = np.zeros((0, 4, 20, 24), np.float32), np.zeros((0, 4, 20, 24), np.float32)
    for form in ("cpu", "numpy"):
        assert refine(masks, guide, case, form=form).shape == masks.shape
    wanted = torch.from_numpy(masks).requires_grad_()
    for form in ("cpu", "torch"):
        refine(wanted, torch.from_numpy(guide), case, form=form).sum().backward()
        assert wanted.grad.shape == masks.shape


def test_tensors_of_two_devices_are_refused(scene):
    guide, masks = both(scene())
    with pytest.raises(UsageError, match="masks is on cpu, guide on meta; move one of them"):
        refine(masks, guide.to("meta"), PairwiseParameters())


def test_step_alone(case, scene, compiled):
    data = scene()
    guide, masks = both(data)
    unary = reference.unary_of(masks, case)
    weights = affinity(guide, case, form="torch")
    expected = reference.step(masks, weights, case, unary)
    for form in ("cpu", "torch"):
        torch.testing.assert_close(step(masks, weights, case, unary, form=form), expected)
    numpy_unary = None if unary is None else unary.numpy()
    for form in ("cpu", "numpy"):
        out = step(data.masks, weights.numpy(), case, numpy_unary, form=form)
        np.testing.assert_allclose(out, expected, rtol=1e-10)
