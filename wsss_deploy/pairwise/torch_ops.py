"""The operator as torch custom operators: eager, autograd, torch.compile, torch.export.

`torch.ops.wsss.pairwise_affinity`, `pairwise_step` and `pairwise_refine` run the form that they are told
("cpu", "cuda" or "torch"); `threads` of 0 are as many as torch has. Parameters travel as their canonical JSON, so a
graph that contains the operators is complete. `pairwise_affinity` and `pairwise_step` have gradients, which can be
differentiated again; `pairwise_refine` has none (`api.refine` uses the other two where one is wanted). None of them
knows dual numbers (forward mode), for which the public functions take plain torch (`has_tangent`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from wsss_deploy.pairwise import cuda_form, native, reference
from wsss_deploy.pairwise.forms import choose
from wsss_deploy.pairwise.parameters import PairwiseParameters

_COMPILED = ("cpu", "cuda")


# torch.compile cannot trace how these two are found out, and they do not change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chosen_form(form: str, device: str, dtype: str, neighbours: int) -> str:
    """The name of the form that tensors get; args and errors as in `forms.choose`."""
    return choose(form, is_torch=True, device=device, dtype=dtype, neighbours=neighbours).name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def text_of(parameters: PairwiseParameters) -> str:
    """The JSON text of a parameters object, which is frozen."""
    return parameters.to_json()


@functools.lru_cache(maxsize=64)
def parse(parameters: str) -> PairwiseParameters:
    """The parameters object of its JSON text."""
    return PairwiseParameters.model_validate_json(parameters)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor is a dual number of forward-mode differentiation; a custom operator would drop its tangent."""
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


@torch.library.custom_op("wsss::pairwise_affinity", mutates_args=())
def pairwise_affinity(guide: Tensor, parameters: str, form: str, threads: int) -> Tensor:
    """(N, G, H, W) to (N, K, H, W), see `reference.affinity`."""
    settings = parse(parameters)
    if form not in _COMPILED:  # plain torch keeps the layout of its input, the fake kernels below are contiguous
        return reference.affinity(guide, settings).contiguous()
    weights = guide.new_empty(guide.shape[0], len(settings.offsets), *guide.shape[2:])
    if form == "cuda":
        cuda_form.affinity(settings, guide.detach().contiguous(), weights)
        return weights
    native.affinity(settings, guide.detach().contiguous(), weights, threads or torch.get_num_threads())
    return weights


@torch.library.custom_op("wsss::pairwise_step", mutates_args=())
def pairwise_step(
    masks: Tensor, weights: Tensor, unary: Tensor | None, parameters: str, form: str, threads: int
) -> Tensor:
    """(N, C, H, W) to (N, C, H, W), see `reference.step`."""
    settings = parse(parameters)
    if form not in _COMPILED:
        return reference.step(masks, weights, settings, unary).contiguous()
    out = masks.new_empty(masks.shape)
    plain = None if unary is None else unary.detach().contiguous()
    inputs = masks.detach().contiguous(), weights.detach().contiguous(), plain
    if form == "cuda":
        cuda_form.step(settings, *inputs, out)
    else:
        native.step(settings, *inputs, out, threads or torch.get_num_threads())
    return out


@torch.library.custom_op("wsss::pairwise_refine", mutates_args=())
def pairwise_refine(
    masks: Tensor, guide: Tensor, parameters: str, form: str, threads: int, compact: bool = False
) -> Tensor:
    """Masks of the guide's size, (N, C, H, W) to (N, C, H, W), in one call; see `reference.refine`."""
    settings = parse(parameters)
    if form not in _COMPILED:
        # Of its own memory, also where there are no steps.
        return reference.refine(masks, guide, settings).clone(memory_format=torch.contiguous_format)
    out = masks.new_empty(masks.shape)
    plain = masks.detach().contiguous()
    inputs = plain, guide.detach().contiguous(), reference.unary_of(plain, settings)
    if form == "cuda":
        cuda_form.refine(settings, *inputs, out)
    else:
        native.refine(settings, *inputs, out, threads or torch.get_num_threads(), compact=compact)
    return out


@pairwise_affinity.register_fake
def _(guide: Tensor, parameters: str, form: str, threads: int) -> Tensor:
    return guide.new_empty(guide.shape[0], len(parse(parameters).offsets), *guide.shape[2:])


@pairwise_step.register_fake
def _(masks: Tensor, weights: Tensor, unary: Tensor | None, parameters: str, form: str, threads: int) -> Tensor:
    return masks.new_empty(masks.shape)


@pairwise_refine.register_fake
def _(masks: Tensor, guide: Tensor, parameters: str, form: str, threads: int, compact: bool = False) -> Tensor:
    return masks.new_empty(masks.shape)


def _affinity_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.parameters = inputs[1]


def _affinity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Through the reference, computed again: the forward keeps nothing but the guide."""
    again = torch.is_grad_enabled()  # create_graph=True: this gradient is itself to be differentiated
    with torch.enable_grad():
        (saved,) = ctx.saved_tensors
        guide = saved.view_as(saved) if again else saved.detach().requires_grad_()
        weights = reference.affinity(guide, parse(ctx.parameters))
        (result,) = torch.autograd.grad(weights, guide, grad, create_graph=again)
    return result, None, None, None


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    masks, weights, unary, ctx.parameters = inputs[:4]
    # The softmax's backward needs its result, the plain sum's does not.
    ctx.mean_field = unary is not None
    ctx.save_for_backward(masks, weights, *([output] if ctx.mean_field else []))


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    masks, weights, *outputs = ctx.saved_tensors
    settings = parse(ctx.parameters)
    grad_unary = None
    if ctx.mean_field:
        (out,) = outputs
        grad_unary = out * (grad - (grad * out).sum(1, keepdim=True))
        grad = grad_unary * settings.mean_field.compatibility if settings.mean_field else grad_unary
    grad_masks = _scatter(grad, weights, settings) if ctx.needs_input_grad[0] else None
    grad_weights = _correlate(grad, masks, settings) if ctx.needs_input_grad[1] else None
    return grad_masks, grad_weights, grad_unary, None, None, None


def _scatter(grad: Tensor, weights: Tensor, settings: PairwiseParameters) -> Tensor:
    """The step's transpose: what each pixel gave to its neighbours' sums; (N, C, H, W)."""
    height, width = grad.shape[2:]
    reach = settings.reach
    padded = grad.new_zeros(*grad.shape[:2], height + 2 * reach, width + 2 * reach)
    for k, (dy, dx) in enumerate(settings.offsets):
        top, left = reach + dy, reach + dx
        padded[:, :, top : top + height, left : left + width] += weights[:, k : k + 1] * grad
    for axis in (2, 3):
        # Values outside the image are copies of the edge, whose gradient they bring back.
        size = grad.shape[axis]
        inner = padded.narrow(axis, reach, size).clone()
        inner.narrow(axis, 0, 1).add_(padded.narrow(axis, 0, reach).sum(axis, keepdim=True))
        inner.narrow(axis, size - 1, 1).add_(padded.narrow(axis, reach + size, reach).sum(axis, keepdim=True))
        padded = inner
    return padded


def _correlate(grad: Tensor, masks: Tensor, settings: PairwiseParameters) -> Tensor:
    """Gradient of the weights, sum over channels of gradient times neighbour; (N, K, H, W)."""
    height, width = grad.shape[2:]
    padded = F.pad(masks, (settings.reach,) * 4, mode="replicate")
    planes = []
    for dy, dx in settings.offsets:
        top, left = settings.reach + dy, settings.reach + dx
        planes.append((grad * padded[:, :, top : top + height, left : left + width]).sum(1))
    return torch.stack(planes, 1)


pairwise_affinity.register_autograd(_affinity_backward, setup_context=_affinity_context)
pairwise_step.register_autograd(_step_backward, setup_context=_step_context)
