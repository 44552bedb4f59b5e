"""The losses of shared feature calibration, weighed by how much a class needs them.

Zhao et al., "SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation", AAAI 2024, arXiv
2401.11719. Decisions: docs/tags.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.errors import UsageError

PROTOTYPE_WEIGHT, SCALE_WEIGHT = 1.6, 0.8
# The release adds three times what the bank draws per class and epoch; why three is not said.
BANK_FACTOR = 3.0


def bank_term(iterations_per_epoch: float, draws: int, classes: int, factor: float = BANK_FACTOR) -> float:
    """Samples that the image bank adds to each class in an epoch, times the release's factor.

    Args:
        iterations_per_epoch: Of the run.
        draws: Bank samples an iteration.
        classes: Foreground classes.
        factor: See `BANK_FACTOR`.
    """
    return factor * iterations_per_epoch * draws / classes


def distribution_coefficients(counts: Sequence[int] | Tensor, bank: float) -> Tensor:
    r"""How strongly the consistency losses act on a class; large for the commonest and the rarest ones.

    .. math:: D_c = \sum_i |n_c - n_i|, \quad a_c = D_c / (n_c + r), \quad DC_c = a_c / \operatorname{mean}(a)

    The release holds D as numbers for PASCAL VOC and applies DC in the order of frequency; here it is computed from
    any data set's counts and belongs to class indices.

    Args:
        counts: Training images per foreground class (K,).
        bank: r, see `bank_term`.

    Returns:
        float64 (K,), mean 1. All 1 where the classes are equally common (then D is 0).

    Raises:
        UsageError: Negative counts, or none.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or not len(n) or bool((n < 0).any()) or bank < 0:
        raise UsageError(f"class counts are {n.tolist()}, bank term {bank}; expected one count per class, 0 or more")
    demand = (n[:, None] - n).abs().sum(dim=1)
    # A class without images and without a bank cannot be weighed; one image is the least that can.
    need = demand / (n + bank).clamp(min=1)
    mean = need.mean()
    return need / mean if mean > 0 else torch.ones_like(n)


def prototype_consistency(smoothed: Tensor, prototype: Tensor, coefficients: Tensor) -> Tensor:
    """L_P without its factor: weighed L1 between smoothed CAMs and prototype CAMs divided by their peaks.

    The gradient flows into both sides, through the peaks as well.

    Args:
        smoothed: M_W (N, K + 1, h, w).
        prototype: M_P before normalisation, same shape.
        coefficients: DC (K,); the background has 1.
    """
    peak = prototype.amax(dim=(2, 3), keepdim=True)
    weights = torch.cat([coefficients.new_ones(1), coefficients]).to(smoothed)
    return (weights[:, None, None] * (smoothed - prototype / (peak + 1e-5)).abs()).mean()


def scale_consistency(smoothed: Tensor, half: Tensor, presence: Tensor, coefficients: Tensor) -> Tensor:
    """L_W without its factor: weighed L1 between the full view's CAMs, shrunk, and the half view's.

    Args:
        smoothed: M_W of the full view (N, K + 1, h, w).
        half: M_W of the half view (N, K + 1, h / 2, w / 2).
        presence: (N, K), 1 where present; 0 and NaN do not count.
        coefficients: DC (K,).
    """
    shrunk = F.interpolate(smoothed[:, 1:], size=half.shape[-2:], mode="bilinear", align_corners=True)
    weights = (presence == 1).to(smoothed) * coefficients.to(smoothed)
    return (weights[:, :, None, None] * (shrunk - half[:, 1:]).abs()).mean()


def classification_loss(scores: Tensor, tags: Tensor) -> Tensor:
    """Multi-label soft margin, the mean over known tags; 0 without any.

    Args:
        scores: (N, K).
        tags: (N, K), 1 and 0; NaN is unknown and does not count.
    """
    known = ~tags.isnan()
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss = F.binary_cross_entropy_with_logits(scores, tags.nan_to_num().to(scores), reduction="none")
        return (loss * known).sum() / known.sum().clamp(min=1)
