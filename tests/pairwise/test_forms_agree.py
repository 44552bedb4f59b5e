"""A faster form is never a different result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsss_deploy.pairwise import PairwiseParameters, affinity, native, numpy_form, reference, refine, step

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


def test_strided_inputs_are_taken_as_they_are_meant(case, scene):
    data = scene(height=20, width=20)
    flipped = data.masks.transpose(0, 1, 3, 2), data.guide.transpose(0, 1, 3, 2)
    expected = refine(np.ascontiguousarray(flipped[0]), np.ascontiguousarray(flipped[1]), case)
    np.testing.assert_array_equal(refine(*flipped, case), expected)
    assert np.array_equal(
        refine(torch.from_numpy(data.masks).mT, torch.from_numpy(data.guide).mT, case, form="torch").shape,
        expected.shape,
    )


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


def test_half_precision_tensors_use_the_plain_form(scene):
    data = scene(height=9, width=9)
    guide, masks = both(data)
    parameters = PairwiseParameters(dilations=(1, 2), iterations=2)
    out = refine(masks.bfloat16(), guide.bfloat16(), parameters)
    assert out.dtype == torch.bfloat16
    assert (out.double() - refine(masks, guide, parameters)).abs().max() < 0.05


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
