from __future__ import annotations

import shutil

import pytest
import torch
from torch.autograd import forward_ad

from wsss_deploy.pairwise import PairwiseParameters, affinity, reference, refine, step, torch_ops

FORMS = ["cpu", "torch"]


@pytest.fixture(params=FORMS)
def form(request) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def tensors(scene, **sizes):
    data = scene(batch=1, classes=2, height=5, width=6, **sizes)
    noise = torch.from_numpy(scene(batch=1, height=7, width=9, seed=1).guide)[:, :, 2:, 3:]
    return noise.contiguous(), torch.from_numpy(data.masks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [("par", torch.contiguous_format), ("par", torch.channels_last), ("mean-field", torch.contiguous_format)],
)
def test_opcheck(cases, name, scene, form, layout):
    case = cases[name]
    guide, masks = (tensor.to(memory_format=layout) for tensor in tensors(scene))
    text = case.to_json()
    weights = affinity(guide, case)
    unary = masks.clone() if case.mean_field else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    guide_leaf, masks_leaf = guide.clone().requires_grad_(), masks.clone().requires_grad_()
    torch.library.opcheck(torch_ops.pairwise_affinity, (guide_leaf, text, form, 1), test_utils=tests)
    torch.library.opcheck(torch_ops.pairwise_step, (masks_leaf, weights, unary, text, form, 1), test_utils=tests)
    torch.library.opcheck(torch_ops.pairwise_refine, (masks, guide, text, form, 1), test_utils=tests[:3])


def test_gradients_of_a_step(case, scene, form):
    guide, masks = tensors(scene)
    weights = affinity(guide, case)
    inputs = [masks.requires_grad_(), weights.requires_grad_()]
    if case.mean_field:
        inputs.append(masks.detach().log().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda m, w, u=None: step(m, w, case, u, form=form), inputs, fast_mode=True, atol=1e-6
    )


def test_gradients_of_the_affinity(case, scene, form):
    guide, _ = tensors(scene)
    assert torch.autograd.gradcheck(
        lambda g: affinity(g, case, form=form), (guide.requires_grad_(),), fast_mode=True, atol=1e-5
    )


def test_gradients_are_differentiable_themselves(case, scene, form):
    data = scene(batch=1, classes=2, channels=4, height=3, width=4)
    guide, masks = torch.from_numpy(data.guide), torch.from_numpy(data.masks)
    # Away from flat patches, where the first derivative jumps.
    guide = (guide + torch.rand(guide.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))) / 2

    def refined(m, g):
        return refine(m, g, case.model_copy(update={"iterations": 2}), form=form)

    inputs = masks.requires_grad_(), guide.requires_grad_()
    assert torch.autograd.gradgradcheck(refined, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)


def test_the_second_derivative_of_the_affinity_is_the_references(cases, scene, form):
    found = []
    for function in (lambda g: affinity(g, cases["par"], form=form), lambda g: reference.affinity(g, cases["par"])):
        guide, _ = tensors(scene)
        (first,) = torch.autograd.grad(function(guide.requires_grad_()).square().sum(), guide, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), guide)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_forward_mode(case, scene, form):
    guide, masks = tensors(scene)
    generator = torch.Generator().manual_seed(1)
    along = [torch.rand(t.shape, dtype=t.dtype, generator=generator) for t in (masks, guide)]
    _, found = torch.func.jvp(lambda m, g: refine(m, g, case, form=form), (masks, guide), tuple(along))
    _, expected = torch.func.jvp(lambda m, g: reference.refine(m, g, case), (masks, guide), tuple(along))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)

    weights = affinity(guide, case)
    unary = masks.log() if case.mean_field else None
    _, found = torch.func.jvp(lambda m: step(m, weights, case, unary, form=form), (masks,), (along[0],))
    _, expected = torch.func.jvp(lambda m: reference.step(m, weights, case, unary), (masks,), (along[0],))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(affinity(forward_ad.make_dual(guide, along[1]), case, form=form)).tangent
        expected = forward_ad.unpack_dual(reference.affinity(forward_ad.make_dual(guide, along[1]), case)).tangent
    torch.testing.assert_close(tangent, expected)


def test_gradient_is_zero_not_nan_where_the_guide_is_flat(scene):
    guide = torch.full((1, 3, 9, 9), 0.5, requires_grad=True)
    affinity(guide, PairwiseParameters(dilations=(1, 2))).square().sum().backward()
    assert torch.equal(guide.grad, torch.zeros_like(guide))


def test_gradient_is_bounded_where_a_pixel_alone_differs(cases, form):
    guide = torch.full((1, 2, 9, 9), 0.25, dtype=torch.float64)
    guide[:, :, 4, 4] = 0.75
    guide.requires_grad_()
    for kind in ("par", "varm"):
        weights = affinity(guide, cases[kind], form=form)
        (gradient,) = torch.autograd.grad((weights**2).sum(), guide)
        assert gradient.abs().max() < 100


def test_torch_compile_takes_the_public_function_whole(scene):
    guide, masks = tensors(scene)
    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    for iterations in (1, 3):
        parameters = PairwiseParameters(dilations=(1, 2), iterations=iterations)
        with torch.no_grad():
            torch.testing.assert_close(compiled(masks, guide, parameters), refine(masks, guide, parameters))
    wanted = masks.detach().clone().requires_grad_()
    compiled(wanted, guide.detach(), parameters).square().sum().backward()
    expected = masks.detach().clone().requires_grad_()
    refine(expected, guide.detach(), parameters).square().sum().backward()
    torch.testing.assert_close(wanted.grad, expected.grad)


@pytest.mark.parametrize("name", ["par", "mean-field"])
def test_results_are_laid_out_as_the_fake_kernels_say(cases, name, scene, form):
    case = cases[name]
    guide, masks = (tensor.to(memory_format=torch.channels_last) for tensor in tensors(scene))
    text, unary = case.to_json(), masks.clone() if case.mean_field else None
    weights = torch_ops.pairwise_affinity(guide, text, form, 1)
    shuffled = weights.to(memory_format=torch.channels_last)
    found = weights, torch_ops.pairwise_step(masks, shuffled, unary, text, form, 1)
    for tensor in (*found, torch_ops.pairwise_refine(masks, guide, text, form, 1)):
        assert tensor.is_contiguous()
    nothing = case.model_copy(update={"iterations": 0}).to_json()
    assert torch_ops.pairwise_refine(masks, guide, nothing, form, 1).is_contiguous()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inductor_takes_channels_last(scene, dtype):
    guide, masks = (tensor.to(dtype).to(memory_format=torch.channels_last) for tensor in tensors(scene))
    parameters = PairwiseParameters(dilations=(1, 2), iterations=2)
    compiled = torch.compile(lambda m, g: refine(m, g, parameters) * 2, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(masks, guide), refine(masks, guide, parameters) * 2)


def test_gradients_flow_through_the_resize(scene):
    guide, masks = tensors(scene)
    masks = masks[:, :, ::2, ::2].clone().requires_grad_()
    refine(masks, guide, PairwiseParameters(dilations=(1, 2), iterations=2)).sum().backward()
    assert masks.grad is not None
    # Every pixel's weights add up to 1.01, so two steps multiply the sum of all values' gradients by 1.01^2.
    assert masks.grad.sum().item() == pytest.approx(1.01**2 * guide.shape[2] * guide.shape[3] * 2, rel=1e-6)


def test_refinement_of_inputs_with_gradients_equals_that_without(case, scene, form):
    guide, masks = tensors(scene)
    plain = refine(masks, guide, case, form=form)
    torch.testing.assert_close(refine(masks.requires_grad_(), guide, case, form=form), plain)


def test_export_keeps_the_nodes_with_dynamic_sizes(scene):
    parameters = PairwiseParameters(dilations=(1, 2), iterations=3)

    class Network(torch.nn.Module):
        def forward(self, masks, guide):
            return refine(masks, guide, parameters)

    guide, masks = tensors(scene)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    two = torch.cat([masks, masks]), torch.cat([guide, guide])
    program = torch.export.export(Network(), two, dynamic_shapes=(sizes, sizes))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("wsss.pairwise_affinity.default") == 1
    assert names.count("wsss.pairwise_step.default") == 3
    other = torch.rand(3, 2, 8, 11, dtype=torch.float64), torch.rand(3, 4, 8, 11, dtype=torch.float64)
    torch.testing.assert_close(program.module()(*other), refine(*other, parameters))
