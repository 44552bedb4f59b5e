"""Gated CRF loss: neighbours of similar colour should get similar class distributions.

Obukhov, Georgoulis, Dai, Van Gool, "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation", 2019,
arXiv 1906.04651. Units, defects of the released code and our decisions: docs/losses.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import EnergyParameters, EnergyTerm, energy

XY = "xy"
MASK = "mask"

Downsampler = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One Gaussian: weight * exp(-1/2 * sum over modalities of |difference / sigma|^2).

    Attributes:
        weight: Factor, above 0.
        sigmas: Width by modality, in that modality's units. `xy` is the position in prediction pixels.

    Raises:
        UsageError: A weight or sigma that is not a finite number above 0, or no modality.
    """

    weight: float
    sigmas: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise UsageError("a kernel names no modality; give at least one, for example {'xy': 6.0}")
        for name, value in {"weight": self.weight, **{f"sigma of '{k}'": v for k, v in self.sigmas.items()}}.items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"a kernel's {name} is {value}; expected a finite number above 0")


def gated_crf_loss(
    probabilities: Tensor,
    kernels: Sequence[Kernel],
    modalities: Mapping[str, Tensor],
    radius: int,
    *,
    mask_src: Tensor | None = None,
    mask_dst: Tensor | None = None,
    compatibility: Tensor | None = None,
    downsamplers: Mapping[str, Downsampler] | None = None,
    count_padding_pairs: bool = False,
    one_way: bool = False,
    kernel_gradient: bool = False,
    form: str = "auto",
) -> Tensor:
    r"""Pairwise energy of class distributions within a window, per counted pixel.

    .. math:: L = \frac{1}{Z} \sum_n \sum_i \sum_{j \in \Omega_r(i)} d_i s_j K_{ij} (1 - \langle p_i, p_j \rangle)

    K is the sum of the kernels, Omega_r(i) the square window without its centre. Z is the number of pixels, or with
    a source mask s its sum, or with a destination mask d its sum, at least 1. Modalities and masks may be a whole
    multiple of the prediction's size; they are area-averaged, and a mask cell counts only if all its pixels do.

    Computed in float32 at least, whatever autocast says, streamed over half of the window's offsets by
    `wsss_deploy.pairwise.energy`, whose form (`energy_form` says which and why) is compiled on a CPU: it needs no
    memory beyond the gradient. Inputs are never modified.

    Args:
        probabilities: Softmax (N, C, H, W).
        kernels: Gaussians that add up to K.
        modalities: By name (N, C_m, k*H, k*W), for example {"rgb": image}. `xy` needs no entry.
        radius: Window half-size r in prediction pixels; may exceed the map.
        mask_src: s (N, 1, k*H, k*W), which pixels send influence; NaN and values below 1 are 0.
        mask_dst: d, the same shape rule, which pixels receive it.
        compatibility: Class matrix (C, C), non-negative with zero diagonal; row c belongs to the receiver. Rows are
            rescaled to sum to C - 1. None is Potts.
        downsamplers: Own ways from a modality to (H, W), by name; `mask` serves both masks.
        count_padding_pairs: Count pairs with neighbours outside the image, at feature and probability 0, as the
            released code does without a source mask. Changes the value only, not the gradient to probabilities.
        one_way: Treat the neighbour's distribution as constant: pixels are pulled towards sources, which stay.
        kernel_gradient: Let gradients flow into the modalities; else kernels are constants.
        form: "auto", or a form of the energy by name.

    Returns:
        Scalar, float32 or float64. Exactly 0 if a mask is empty.

    Raises:
        UsageError: Shapes, names or values that do not fit.
        BackendError: A form asked for by name is not available.
    """
    _check(probabilities, kernels, modalities, radius, compatibility)
    with torch.autocast(probabilities.device.type, enabled=False):
        dtype = torch.promote_types(probabilities.dtype, torch.float32)
        p = probabilities.to(dtype)
        shrink = _Shrink((p.shape[-2], p.shape[-1]), downsamplers or {})
        used = {name: modalities[name] for kernel in kernels for name in kernel.sigmas if name != XY}
        small = {
            name: shrink.modality(name, (m if kernel_gradient else m.detach()).to(dtype)) for name, m in used.items()
        }
        features = [_features(kernel, small) for kernel in kernels]
        source, destination = (None if mask is None else shrink.mask(mask, p) for mask in (mask_src, mask_dst))
        terms = tuple(EnergyTerm(weight=kernel.weight, xy_sigma=kernel.sigmas.get(XY)) for kernel in kernels)
        total = energy(
            p,
            features,
            EnergyParameters(radius=radius, terms=terms, one_way=one_way),
            source=source,
            destination=destination,
            compatibility=None if compatibility is None else _rescaled(compatibility.to(p.device)).to(dtype),
            form=form,
        )
        counted = destination if destination is not None else source
        if count_padding_pairs and source is None and compatibility is None:
            receivers = torch.ones_like(p[:, :1]) if destination is None else destination
            total = total + _padding_energy(kernels, features, receivers, radius)
        return total / (p[:, :1].numel() if counted is None else counted.sum().clamp(min=1))


class GatedCRFLoss(nn.Module):
    """`gated_crf_loss` with its settings fixed.

    Args:
        kernels: Gaussians that add up to K.
        radius: Window half-size in prediction pixels.
        compatibility: Class matrix (C, C), or None for Potts.
        downsamplers: Own ways from a modality to the prediction's size.
        count_padding_pairs: See the function.
        one_way: See the function.
        kernel_gradient: See the function.
    """

    compatibility: Tensor | None

    def __init__(
        self,
        kernels: Sequence[Kernel],
        radius: int,
        *,
        compatibility: Tensor | None = None,
        downsamplers: Mapping[str, Downsampler] | None = None,
        count_padding_pairs: bool = False,
        one_way: bool = False,
        kernel_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.kernels, self.radius, self.downsamplers = tuple(kernels), radius, downsamplers
        self.count_padding_pairs, self.one_way, self.kernel_gradient = count_padding_pairs, one_way, kernel_gradient
        self.register_buffer("compatibility", compatibility, persistent=False)

    def forward(
        self,
        probabilities: Tensor,
        modalities: Mapping[str, Tensor],
        mask_src: Tensor | None = None,
        mask_dst: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss; arguments as in `gated_crf_loss`."""
        return gated_crf_loss(
            probabilities,
            self.kernels,
            modalities,
            self.radius,
            mask_src=mask_src,
            mask_dst=mask_dst,
            compatibility=self.compatibility,
            downsamplers=self.downsamplers,
            count_padding_pairs=self.count_padding_pairs,
            one_way=self.one_way,
            kernel_gradient=self.kernel_gradient,
        )

    def extra_repr(self) -> str:
        """Kernels and window for `print`."""
        kernels = " + ".join(
            f"{k.weight:g} exp({', '.join(f'{name}: {sigma:g}' for name, sigma in k.sigmas.items())})"
            for k in self.kernels
        )
        return f"{kernels}, radius={self.radius}, one_way={self.one_way}, kernel_gradient={self.kernel_gradient}"


@dataclass(frozen=True)
class _Shrink:
    size: tuple[int, int]
    own: Mapping[str, Downsampler]

    def modality(self, name: str, maps: Tensor) -> Tensor:
        """Bring a modality (N, C_m, k*H, k*W) to (N, C_m, H, W)."""
        small = self.own[name](maps, self.size) if name in self.own else self._average(name, maps)
        if small.shape[-2:] != self.size:
            raise UsageError(f"the down-sampler of '{name}' gave {tuple(small.shape)}, expected (..., {self.size})")
        return small

    def mask(self, mask: Tensor, like: Tensor) -> Tensor:
        """Bring a mask (N, 1, k*H, k*W) to (N, 1, H, W); only whole cells stay 1."""
        if mask.ndim != 4 or mask.shape[:2] != (like.shape[0], 1):
            raise UsageError(f"a mask has shape {tuple(mask.shape)}; expected ({like.shape[0]}, 1, height, width)")
        values = mask.detach().to(like)
        if values.shape[-2:] != self.size:
            values = self.modality(MASK, values)
        # NaN fails the comparison as well.
        return torch.where(values >= 1, values, torch.zeros_like(values))

    def _average(self, name: str, maps: Tensor) -> Tensor:
        (height, width), (h, w) = maps.shape[-2:], self.size
        if height % h or width % w or height * w != width * h:
            raise UsageError(
                f"'{name}' is {height}x{width}, the prediction {h}x{w}; expected the same whole stride on both axes: "
                "crop or pad the input, or give a down-sampler for it"
            )
        return maps if height == h else F.avg_pool2d(maps, height // h)


def _features(kernel: Kernel, modalities: Mapping[str, Tensor]) -> Tensor | None:
    scaled = [modalities[name] / sigma for name, sigma in kernel.sigmas.items() if name != XY]
    return torch.cat(scaled, dim=1) if scaled else None


def _rescaled(matrix: Tensor) -> Tensor:
    """Rows with sum C - 1, as Potts has, in the matrix's own precision, as in the release; a row of zeros stays."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return F.normalize(matrix, p=1, dim=1) * (len(matrix) - 1)


def _padding_energy(
    kernels: Sequence[Kernel], features: Sequence[Tensor | None], destination: Tensor, radius: int
) -> Tensor:
    """Energy of pairs with a neighbour outside the image, whose features, position included, are 0."""
    height, width = destination.shape[-2:]
    ys, xs = (torch.arange(n, device=destination.device, dtype=destination.dtype) for n in (height, width))
    inside = [(index + radius).clamp(max=len(index) - 1) - (index - radius).clamp(min=0) + 1 for index in (ys, xs)]
    outside = (2 * radius + 1) ** 2 - inside[0][:, None] * inside[1]
    kernel_sum = torch.zeros_like(destination)
    for kernel, feature in zip(kernels, features, strict=True):
        exponent = torch.zeros_like(destination) if feature is None else feature.square().sum(1, keepdim=True)
        if XY in kernel.sigmas:
            exponent = exponent + (ys.square()[:, None] + xs.square()) / kernel.sigmas[XY] ** 2
        kernel_sum = kernel_sum + kernel.weight * torch.exp(-exponent / 2)
    return (destination * outside * kernel_sum).sum()


def _check(
    probabilities: Tensor,
    kernels: Sequence[Kernel],
    modalities: Mapping[str, Tensor],
    radius: int,
    compatibility: Tensor | None,
) -> None:
    if probabilities.ndim != 4 or not probabilities.is_floating_point() or not probabilities.numel():
        raise UsageError(
            f"probabilities are {probabilities.dtype} of shape {tuple(probabilities.shape)}; expected floating point "
            "(N, C, H, W), not empty"
        )
    if not kernels:
        raise UsageError("no kernels were given; expected at least one")
    if radius < 1:
        raise UsageError(f"the radius is {radius}; expected 1 or more")
    if XY in modalities or MASK in modalities:
        raise UsageError(f"modalities named '{XY}' or '{MASK}' are reserved; position and masks need no entry")
    for name in {name for kernel in kernels for name in kernel.sigmas if name != XY}:
        if name not in modalities:
            known = ", ".join(sorted(modalities)) or "none"
            raise UsageError(f"a kernel uses modality '{name}', given are: {known}; add it to modalities")
        if modalities[name].ndim != 4 or len(modalities[name]) != len(probabilities):
            raise UsageError(
                f"modality '{name}' has shape {tuple(modalities[name].shape)}; expected {len(probabilities)} maps "
                "(N, channels, height, width)"
            )
    if compatibility is not None:
        classes = probabilities.shape[1]
        if compatibility.shape != (classes, classes):
            raise UsageError(f"compatibility is {tuple(compatibility.shape)}; expected ({classes}, {classes})")
        if bool((compatibility < 0).any()) or bool(compatibility.diagonal().any()):
            raise UsageError("compatibility has a negative value or a non-zero diagonal; expected neither")
