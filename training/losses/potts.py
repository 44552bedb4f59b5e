"""Relaxations of the Potts model to class distributions, and the soft pseudo-labels that minimise one.

Zhang and Boykov, "Soft Self-labeling and Potts Relaxations for Weakly-Supervised Segmentation", CVPR 2025,
arXiv 2507.01721. What is the paper's and what is reconstructed: docs/sparse_labels.md.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError

Relaxation = Literal[
    "bilinear", "quadratic", "normalized_quadratic", "collision_cross_entropy", "collision_divergence", "log_quadratic"
]

# Half of the eight neighbours, with the weight that makes up for their distance.
_NEIGHBOURS = ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.5**0.5), (1, -1, 0.5**0.5))
# A product of distributions may vanish; its logarithm is cut at -log of this.
_EPSILON = 1e-6


def collision_cross_entropy(first: Tensor, second: Tensor) -> Tensor:
    """-ln <p, q> over the classes: how unlikely two independent draws collide; symmetric.

    Unlike the cross-entropy it asks nothing of a network where the other distribution is uniform.

    Args:
        first: Distributions (N, C, H, W).
        second: The same shape.

    Returns:
        (N, H, W).
    """
    return -torch.log((first * second).sum(1).clamp(min=_EPSILON))


def potts(first: Tensor, second: Tensor, relaxation: Relaxation) -> Tensor:
    r"""A pair's penalty.

    ``bilinear`` 1 - <p, q>; ``quadratic`` |p - q|^2 / 2; ``normalized_quadratic`` 1 - <p, q> / (|p| |q|);
    ``collision_cross_entropy`` -ln <p, q>; ``collision_divergence`` -ln (<p, q> / (|p| |q|)); ``log_quadratic``
    -ln (1 - |p - q|^2 / 2).

    Args:
        first: Distributions (N, C, ...).
        second: The same shape.
        relaxation: Which.

    Returns:
        (N, ...).

    Raises:
        UsageError: No such relaxation.
    """
    if relaxation not in get_args(Relaxation):
        raise UsageError(f"relaxation '{relaxation}' is not known; choose one of: {', '.join(get_args(Relaxation))}")
    if relaxation in ("quadratic", "log_quadratic"):
        agreement = 1 - (first - second).square().sum(1) / 2
    else:
        if relaxation in ("normalized_quadratic", "collision_divergence"):
            first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        agreement = (first * second).sum(1)
    if relaxation in ("bilinear", "quadratic", "normalized_quadratic"):
        return 1 - agreement
    return -torch.log(agreement.clamp(min=_EPSILON))


def potts_energy(
    labels: Tensor, image: Tensor, rgb: float, relaxation: Relaxation, valid: Tensor | None = None
) -> Tensor:
    r"""Sum over pairs of the eight neighbours of w_ij P(y_i, y_j), w_ij = exp(-|I_i - I_j|^2 / 2 rgb^2) / |x_i - x_j|.

    Args:
        labels: Distributions y (N, C, H, W).
        image: (N, 3, H, W); a constant.
        rgb: Width in the image's units.
        relaxation: P.
        valid: bool (N, H, W); pairs with a pixel outside it do not count. None is everywhere.

    Returns:
        Scalar.
    """
    total = labels.new_zeros(())
    for dy, dx, nearness in _NEIGHBOURS:
        one, two = _shifted(labels, dy, dx)
        with torch.no_grad():
            here, there = _shifted(image, dy, dx)
            weight = nearness * torch.exp(-(here - there).square().sum(1) / (2 * rgb**2))
            if valid is not None:
                inside = _shifted(valid[:, None], dy, dx)
                weight = weight * (inside[0] & inside[1])[:, 0]
        total = total + (weight * potts(one, two, relaxation)).sum()
    return total


def soft_labels(
    probabilities: Tensor,
    seeds: Tensor,
    image: Tensor,
    *,
    eta: float,
    strength: float,
    rgb: float,
    relaxation: Relaxation,
    steps: int,
    rate: float,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Soft pseudo-labels: the sub-problem of self-labelling, by gradient descent over their logits.

    .. math:: \min_y \eta \sum_{i \notin S} H_{CCE}(y_i, \sigma_i) + \lambda \sum_{ij} w_{ij} P(y_i, y_j),
        \quad y_i = \bar y_i \text{ on seeds } S

    Args:
        probabilities: sigma (N, C, H, W), the network's; constants. They are the first pseudo-labels.
        seeds: int64 (N, H, W); 255 is unlabelled.
        image: (N, 3, H, W).
        eta: Factor of the tie to the network.
        strength: lambda.
        rgb: See `potts_energy`.
        relaxation: P.
        steps: Gradient steps.
        rate: Step size for the logits of y; a step moves no logit by more than 1.
        valid: bool (N, H, W); None is everywhere.

    Returns:
        y (N, C, H, W), float32 at least; one-hot on seeds. No gradient.
    """
    sigma = probabilities.detach().to(torch.promote_types(probabilities.dtype, torch.float32))
    given = (seeds != IGNORE_INDEX)[:, None]
    one_hot = F.one_hot(seeds.masked_fill(seeds == IGNORE_INDEX, 0), sigma.shape[1]).movedim(-1, 1).to(sigma)
    # Saturated predictions would not move: a logit needs some slope.
    logits = sigma.clamp(min=1e-4).log()
    free = (~given[:, 0]).to(sigma) if valid is None else (~given[:, 0] & valid).to(sigma)
    with torch.enable_grad():
        for _ in range(steps):
            logits = logits.detach().requires_grad_()
            y = torch.where(given, one_hot, logits.softmax(1))
            energy = eta * (free * collision_cross_entropy(y, sigma)).sum()
            energy = energy + strength * potts_energy(y, image, rgb, relaxation, valid)
            (slope,) = torch.autograd.grad(energy, logits)
            logits = logits - (rate * slope).clamp(-1, 1)
    return torch.where(given, one_hot, logits.detach().softmax(1))


def _shifted(maps: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Two views (N, C, H - dy, W - |dx|) whose pixels are neighbours at (dy, dx); dy is 0 or more."""
    height, width = maps.shape[-2:]
    left, right = max(0, -dx), max(0, dx)
    here = maps[..., : height - dy, left : width - right]
    there = maps[..., dy:, right : width - left]
    return here, there
