"""The pair energy's public functions: checks and choice of the form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import energy_cuda_form
from wsss_deploy.pairwise.energy_parameters import EnergyParameters
from wsss_deploy.pairwise.forms import Form, choose, cuda_obstacle

if TYPE_CHECKING:
    from torch import Tensor

# The compiled kernels keep the weights of this many rows; larger windows are rare and take plain torch.
COMPILED_REACH = 32


def energy(
    probabilities: Tensor,
    features: Sequence[Tensor | None],
    parameters: EnergyParameters,
    *,
    source: Tensor | None = None,
    destination: Tensor | None = None,
    compatibility: Tensor | None = None,
    form: str = "auto",
    threads: int | None = None,
) -> Tensor:
    r"""Energy of class distributions that differ between alike neighbours (Gated CRF, 2019, arXiv 1906.04651).

    .. math:: E = \sum_n \sum_i \sum_{j \in \Omega_r(i)} d_i s_j K_{ij} (1 - \langle p_i, p_j \rangle)

    K is the sum of the terms, Omega_r(i) the square window without its centre and within the image. Value and
    gradient come from one sweep over half of the window; nothing is unfolded.

    Args:
        probabilities: p (N, C, H, W), float32 or float64 (other types in plain torch).
        features: Per term of the kernel a map (N, G, H, W), divided by its sigmas, or None. Maps that require a
            gradient get one: detach them where the kernel is meant to be constant.
        parameters: Window, kernel and direction.
        source: s (N, 1, H, W), which pixels send influence; None is everywhere.
        destination: d (N, 1, H, W), which pixels receive it; None is everywhere.
        compatibility: M (C, C) in place of Potts: a pair's energy is p_i^T M p_j.
        form: "auto", or "cpu", "cuda" or "torch" to force it.
        threads: CPU threads of the compiled form, None takes torch's; any number gives the same bits.

    Returns:
        E, a scalar of the probabilities' type, differentiable with respect to probabilities and features. A NaN
        probability or feature makes it NaN, and the gradients of all pixels that have it in their window.

    Raises:
        UsageError: Wrong shapes or types, an unknown form, forward-mode differentiation.
        BackendError: A form asked for by name is not available.
    """
    import torch

    from wsss_deploy.pairwise import energy_ops
    from wsss_deploy.pairwise.torch_ops import has_tangent

    _check(probabilities, features, parameters, source, destination, compatibility)
    if has_tangent(probabilities, *features, source, destination, compatibility):
        raise UsageError(
            "an argument of the pair energy is a dual number (torch.func.jvp, forward_ad), but the energy has no "
            "derivative in forward mode; use backward or torch.autograd.grad"
        )
    chosen = energy_form(probabilities, parameters.radius, form)
    ones = torch.ones_like(probabilities[:, :1])
    maps = [f for f in features if f is not None]
    numbers = iter(range(len(maps)))
    value, _, _ = energy_ops.pairwise_energy(
        probabilities,
        ones if source is None else source,
        ones if destination is None else destination,
        compatibility,
        maps,
        [-1 if f is None else next(numbers) for f in features],
        [torch.is_grad_enabled() and f is not None and f.requires_grad for f in features],
        parameters.to_json(),
        chosen.name,
        threads or torch.get_num_threads(),
    )
    return cast("Tensor", value)


def energy_form(probabilities: Tensor, radius: int, form: str = "auto") -> Form:
    """Which form of the energy runs for these probabilities (N, C, H, W), and why.

    Raises:
        UsageError: No such form, or one that cannot take this call.
        BackendError: A form asked for by name is not available.
    """
    kind, device = str(probabilities.dtype).removeprefix("torch."), probabilities.device.type
    if form == "cuda" or (form == "auto" and device == "cuda"):
        return _cuda_form(str(probabilities.device), kind, named=form == "cuda")
    chosen = choose(form, is_torch=True, device=device, dtype=kind)
    reach = min(radius, max(probabilities.shape[-2:]) - 1)
    if chosen.name != "cpu" or reach <= COMPILED_REACH:
        return chosen
    reason = f"the window reaches {reach} pixels, the compiled kernels {COMPILED_REACH}"
    if form == "cpu":
        raise UsageError(f"form 'cpu' was asked for, but {reason}; use a smaller radius or form 'auto'")
    return Form("torch", True, reason)


def _cuda_form(device: str, kind: str, *, named: bool) -> Form:
    if kind not in energy_cuda_form.REALS or device.partition(":")[0] != "cuda":
        reason = f"the probabilities are {kind} on {device}, these kernels take float32 and float64 on 'cuda'"
        if named:
            raise UsageError(f"form 'cuda' was asked for, but {reason}; move or convert them, or use form 'auto'")
        return Form("torch", True, reason)
    obstacle = cuda_obstacle(device, energy_cuda_form.check)
    if obstacle is None:
        return Form("cuda", True, "kernels by NVRTC, which equal plain torch on this device")
    if named:
        raise BackendError(f"form 'cuda' of the energy was asked for: {obstacle}")
    return Form("torch", True, obstacle)


def _check(
    probabilities: Tensor,
    features: Sequence[Tensor | None],
    parameters: EnergyParameters,
    source: Tensor | None,
    destination: Tensor | None,
    compatibility: Tensor | None,
) -> None:
    if probabilities.ndim != 4 or not probabilities.is_floating_point() or not probabilities.numel():
        raise UsageError(
            f"probabilities are {probabilities.dtype} of shape {tuple(probabilities.shape)}; expected floating point "
            "(N, C, H, W), not empty"
        )
    if len(features) != len(parameters.terms):
        raise UsageError(f"{len(features)} features for {len(parameters.terms)} terms; give a map or None for each")
    batch, classes, height, width = probabilities.shape
    expected: dict[str, tuple[int | None, Tensor | None]] = {f"feature {i}": (None, f) for i, f in enumerate(features)}
    expected |= {"source": (1, source), "destination": (1, destination)}
    for name, (channels, tensor) in expected.items():
        if tensor is None:
            continue
        shape = (batch, channels if channels is not None else tensor.shape[1:2].numel(), height, width)
        if tuple(tensor.shape) != shape or 0 in shape:
            wanted = f"({batch}, {channels or 'channels'}, {height}, {width})"
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")
        if tensor.dtype != probabilities.dtype:
            raise UsageError(f"{name} is {tensor.dtype}, probabilities are {probabilities.dtype}; convert one of them")
        if tensor.device != probabilities.device:
            raise UsageError(f"{name} is on {tensor.device}, probabilities on {probabilities.device}; move one of them")
    if compatibility is not None and (
        tuple(compatibility.shape) != (classes, classes) or compatibility.dtype != probabilities.dtype
    ):
        raise UsageError(
            f"compatibility is {compatibility.dtype} {tuple(compatibility.shape)}; expected {probabilities.dtype} "
            f"({classes}, {classes})"
        )
