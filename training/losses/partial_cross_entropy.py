"""Cross-entropy over the labelled pixels alone, and class weights for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError


def partial_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the labelled pixels: sum(w_y * nll) / sum(w_y).

    Logits of another size than the labels are brought to it first, bilinearly (align_corners=False). Computed in
    float32 at least, whatever autocast says.

    Args:
        logits: (N, C, h, w).
        labels: int64 (N, H, W); 255 is unlabelled.
        class_weights: w (C,), or None for equal weights.

    Returns:
        Scalar, float32 or float64. Exactly 0, still joined to `logits`, when nothing is labelled (or everything
        labelled has weight 0).

    Raises:
        UsageError: Shapes that do not fit.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise UsageError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, C, h, w) and (N, H, W)"
        )
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        raise UsageError(f"{tuple(class_weights.shape)} class weights for {logits.shape[1]} classes; expected one each")
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        full = logits.to(dtype)
        if full.shape[-2:] != labels.shape[-2:]:
            full = F.interpolate(full, size=tuple(labels.shape[-2:]), mode="bilinear", align_corners=False)
        weights = None if class_weights is None else class_weights.to(full)
        total = F.cross_entropy(full, labels, weights, ignore_index=IGNORE_INDEX, reduction="sum")
        labelled = labels != IGNORE_INDEX
        if weights is None:
            count = labelled.sum().to(dtype)
        else:
            count = (weights[labels.clamp(max=len(weights) - 1)] * labelled).sum()
        # The sum of nothing is 0 already; dividing it by 1 keeps it joined to the logits without a branch.
        return total / torch.where(count > 0, count, torch.ones_like(count))


class PartialCrossEntropyLoss(nn.Module):
    """`partial_cross_entropy` with fixed class weights.

    Args:
        class_weights: (C,), or None for equal weights.
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss; arguments as in `partial_cross_entropy`."""
        return partial_cross_entropy(logits, labels, self.class_weights)

    def extra_repr(self) -> str:
        """Whether classes are weighted, for `print`."""
        return "class_weights=off" if self.class_weights is None else f"class_weights=({len(self.class_weights)},)"


def class_weights_from_counts(counts: Sequence[int] | Tensor) -> Tensor:
    """Weights that lift rare classes: w_c = 1 / ln(q_c + 1.10) with q = counts / sum, then normalised to sum 1.

    From the released code of the Gated CRF loss (arXiv 1906.04651); a class that never occurs gets the largest weight.

    Args:
        counts: Labelled pixels (or clicks) per class over the training split, (C,).

    Returns:
        float32 (C,), sum 1.

    Raises:
        UsageError: No counts, negative ones, or none above 0.
    """
    histogram = torch.as_tensor(counts, dtype=torch.float64)
    if histogram.ndim != 1 or bool((histogram < 0).any()) or not bool(histogram.sum() > 0):
        raise UsageError(f"class counts are {histogram.tolist()}; expected one per class, 0 or more, not all 0")
    weights = 1 / torch.log(histogram / histogram.sum() + 1.10)
    return (weights / weights.sum()).float()
