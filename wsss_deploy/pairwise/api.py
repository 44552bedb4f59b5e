"""The public functions: checks, choice of the form, numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from wsss_deploy.environment import cpu_threads
from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import native, numpy_form
from wsss_deploy.pairwise.forms import choose
from wsss_deploy.pairwise.parameters import PairwiseParameters

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Array = TypeVar("Array", "NDArray[np.floating]", "torch.Tensor")
#: See `refine`.
Storage = Literal["full", "compact"]


def affinity(guide: Array, parameters: PairwiseParameters, *, form: str = "auto", threads: int | None = None) -> Array:
    """Weights of every pixel's neighbours.

    Args:
        guide: (N, G, H, W) floating, numpy or torch. par and varm do not depend on its scale; gaussian does. Values
            of 1e17 and more (float64: 1e150) may give NaN, as sums of their squares are no numbers.
        parameters: Kind, neighbours, constants. `sigma_features` of a Gaussian term needs a guide of 4 channels.
        form: "auto", or a form's name to force it.
        threads: CPU threads of the compiled form; None takes torch's number, for arrays
            `wsss_deploy.environment.cpu_threads`.

    Returns:
        (N, K, H, W), K in the order of `parameters.offsets`. A NaN in the guide makes all weights NaN that
        depend on it; differentiable with respect to a torch guide (0 where a par or varm patch is flat), twice too, and
        in forward mode (`torch.func.jvp`), which takes plain torch whatever the form.

    Raises:
        UsageError: Wrong shapes or types, no channels for the features of a Gaussian term, an unknown form.
        BackendError: A form asked for by name is not available.
    """
    _check({"guide": guide})
    _check_features(guide, parameters)
    if isinstance(guide, np.ndarray):
        if _numpy_form(form, guide) == "numpy":
            return numpy_form.affinity(guide, parameters)
        weights = np.empty((guide.shape[0], len(parameters.offsets), *guide.shape[2:]), guide.dtype)
        native.affinity(parameters, np.ascontiguousarray(guide), weights, threads or cpu_threads())
        return weights
    from wsss_deploy.pairwise import reference, torch_ops

    name, count = _torch_form(form, guide, parameters, threads)
    if torch_ops.has_tangent(guide):
        return reference.affinity(guide, parameters)
    return cast("torch.Tensor", torch_ops.pairwise_affinity(guide, torch_ops.text_of(parameters), name, count))


def step(
    masks: Array,
    weights: Array,
    parameters: PairwiseParameters,
    unary: Array | None = None,
    *,
    form: str = "auto",
    threads: int | None = None,
) -> Array:
    """m'(p) = sum_k w_k(p) m(clamp(p + o_k)), or with a mean-field form softmax(unary + compatibility * sum).

    Args:
        masks: (N, C, H, W) floating. NaN and infinity reach every pixel that has them as a neighbour.
        weights: (N, K, H, W), from `affinity` with the same parameters.
        parameters: Neighbours, mean-field form.
        unary: (N, C, H, W), given exactly when `parameters.mean_field` is.
        form: As in `affinity`.
        threads: As in `affinity`.

    Returns:
        (N, C, H, W), differentiable with respect to torch masks, weights and unary, as `affinity` is.

    Raises:
        UsageError: Wrong shapes or types, an unknown form.
        BackendError: A form asked for by name is not available.
    """
    _check({"masks": masks, "weights": weights, **({} if unary is None else {"unary": unary})})
    if (unary is None) != (parameters.mean_field is None):
        given = "no unary term" if unary is None else "a unary term"
        raise UsageError(f"{given} with mean_field {parameters.mean_field}: give both or neither")
    if weights.shape[1] != len(parameters.offsets):
        raise UsageError(f"weights have {weights.shape[1]} neighbours, the parameters {len(parameters.offsets)}")
    if unary is not None and unary.shape != masks.shape:
        raise UsageError(f"unary is {_shape(unary)}, masks are {_shape(masks)}; both are (N, C, H, W)")
    if isinstance(masks, np.ndarray):
        if _numpy_form(form, masks) == "numpy":
            return numpy_form.step(masks, weights, parameters, unary)
        out = np.empty(masks.shape, masks.dtype)
        unary = None if unary is None else np.ascontiguousarray(unary)
        plain = np.ascontiguousarray(masks), np.ascontiguousarray(weights)
        native.step(parameters, *plain, unary, out, threads or cpu_threads())
        return out
    from wsss_deploy.pairwise import reference, torch_ops

    name, count = _torch_form(form, masks, parameters, threads)
    if torch_ops.has_tangent(masks, weights, unary):
        return reference.step(masks, weights, parameters, unary)
    return cast(
        "torch.Tensor", torch_ops.pairwise_step(masks, weights, unary, torch_ops.text_of(parameters), name, count)
    )


def refine(
    masks: Array,
    guide: Array,
    parameters: PairwiseParameters,
    *,
    form: str = "auto",
    threads: int | None = None,
    storage: Storage = "full",
) -> Array:
    """Masks resized to the guide (bilinear, aligned corners), an affinity and `parameters.iterations` steps.

    Args:
        masks: (N, C, h, w) floating; probabilities for a mean-field form.
        guide: (N, G, H, W) of the same type, for example the image in [0, 1].
        parameters: Everything else.
        form: As in `affinity`.
        threads: As in `affinity`.
        storage: What the compiled form of the CPU keeps weights and the masks between steps as. "full" is their own
            type. "compact" is 16 bits (weights as float16 with their exact sums, masks in 65535 levels), which takes
            half of the memory and two thirds of the time and differs by less than 1e-3: for float32 masks in [0, 1]
            and a finite guide, kind par or normalised gaussian without a mean field, at most 100 steps (45 of par
            without `parameters.normalise`, whose masks grow by 1.01 a step), on AVX2 and AVX-512. All else is computed
            as with "full", and so is a whole batch if one of its images does not fit.

    Returns:
        (N, C, H, W), differentiable with respect to torch masks and guide, as `affinity` is. Without
        `parameters.normalise` par scales the masks by 1.01 a step and varm by 0.99.

    Raises:
        UsageError: Wrong shapes or types, no channels for the features of a Gaussian term, an unknown form.
        BackendError: A form asked for by name is not available.
    """
    _check({"masks": masks, "guide": guide}, resized=True)
    _check_features(guide, parameters)
    if storage not in ("full", "compact"):
        raise UsageError(f"storage is {storage!r}; expected 'full' or 'compact'")
    height, width = guide.shape[2:]
    if isinstance(masks, np.ndarray):
        name = _numpy_form(form, masks)
        masks = numpy_form.resize(masks, height, width)
        if name == "numpy":
            return numpy_form.refine(masks, guide, parameters).copy()
        out, masks = np.empty(masks.shape, masks.dtype), np.ascontiguousarray(masks)
        unary = numpy_form.unary_of(masks, parameters)
        count = threads or cpu_threads()
        native.refine(parameters, masks, np.ascontiguousarray(guide), unary, out, count, compact=storage == "compact")
        return out
    import torch

    from wsss_deploy.pairwise import reference, torch_ops

    name, count = _torch_form(form, masks, parameters, threads)
    if torch_ops.has_tangent(masks, guide):
        return reference.refine(masks, guide, parameters)
    masks = reference.resize(masks, height, width)
    wants_gradient = torch.is_grad_enabled() and (masks.requires_grad or guide.requires_grad)
    if not wants_gradient and not torch.compiler.is_exporting():
        compact = storage == "compact"
        return cast(
            "torch.Tensor", torch_ops.pairwise_refine(masks, guide, torch_ops.text_of(parameters), name, count, compact)
        )
    text = torch_ops.text_of(parameters)
    weights = torch_ops.pairwise_affinity(guide, text, name, count)
    unary = reference.unary_of(masks, parameters)
    for _ in range(parameters.iterations):
        masks = torch_ops.pairwise_step(masks, weights, unary, text, name, count)
    return masks


def _numpy_form(form: str, array: NDArray[np.floating]) -> str:
    return choose(form, is_torch=False, dtype=array.dtype.name).name


def _torch_form(
    form: str, tensor: torch.Tensor, parameters: PairwiseParameters, threads: int | None
) -> tuple[str, int]:
    from wsss_deploy.pairwise import torch_ops

    kind = str(tensor.dtype).removeprefix("torch.")
    return torch_ops.chosen_form(form, str(tensor.device), kind, len(parameters.offsets)), threads or 0


def _check(arrays: dict[str, Any], *, resized: bool = False) -> None:
    """Same library, same floating type, four axes, same batch and (unless `resized`) same size."""
    (first_name, first), *others = arrays.items()
    for name, array in arrays.items():
        kind = str(getattr(array, "dtype", type(array).__name__)).removeprefix("torch.")
        if "float" not in kind:
            raise UsageError(f"{name} must be a floating numpy array or torch tensor, it is {kind}")
        if len(array.shape) != 4:
            raise UsageError(f"{name} must have the axes (N, channels, H, W), its shape is {_shape(array)}")
        if 0 in array.shape[1:]:
            raise UsageError(f"{name} is empty: its shape is {_shape(array)}")
    for name, array in others:
        if type(array) is not type(first) and isinstance(first, np.ndarray) != isinstance(array, np.ndarray):
            raise UsageError(f"{first_name} and {name} must both be numpy arrays or both torch tensors")
        if not isinstance(first, np.ndarray) and array.device != first.device:
            raise UsageError(f"{first_name} is on {first.device}, {name} on {array.device}; move one of them")
        if array.dtype != first.dtype:
            raise UsageError(f"{first_name} is {first.dtype}, {name} is {array.dtype}; convert one of them")
        if array.shape[0] != first.shape[0] or (not resized and array.shape[2:] != first.shape[2:]):
            raise UsageError(
                f"{first_name} has shape {_shape(first)}, {name} has {_shape(array)}; "
                + ("the batch must agree" if resized else "batch, height and width must agree")
            )


def _check_features(guide: Any, parameters: PairwiseParameters) -> None:
    """A term of features alone would give every neighbour the weight 1 where there are none."""
    wanted = [term.sigma_features for term in parameters.terms if term.sigma_features is not None]
    if wanted and guide.shape[1] <= 3:
        raise UsageError(
            f"a Gaussian term has sigma_features {wanted[0]:g}, for guide channels from the fourth on, but the guide "
            f"has {guide.shape[1]}: its shape is {_shape(guide)}; append the features, or leave sigma_features out"
        )


def _shape(array: Any) -> str:
    return "(" + ", ".join(str(size) for size in array.shape) + ")"
