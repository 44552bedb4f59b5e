"""Cross-entropy over the labelled pixels alone, and class weights for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError

# With fewer labels than one pixel in this many, raising the logits at the labels alone is the cheaper way.
_SPARSE = 8


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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores, targets = _scores_at_labels(logits, labels)
        weights = None if class_weights is None else class_weights.to(logits)
        total = F.cross_entropy(scores, targets, weights, ignore_index=IGNORE_INDEX, reduction="sum")
        counted = (targets != IGNORE_INDEX).to(logits.dtype)
        if weights is not None:
            counted = counted * weights[targets.clamp(max=len(weights) - 1)]
        norm = counted.sum()
        # The sum of nothing is 0 already; dividing it by 1 keeps it joined to the logits without a branch.
        return total / torch.where(norm > 0, norm, torch.ones_like(norm))


def _scores_at_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where they are needed, (N, C, H, W) or (M, C), with the labels that belong to them."""
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits, labels
    labelled = (labels != IGNORE_INDEX).nonzero()
    if len(labelled) * _SPARSE < labels.numel():
        return _bilinear_at(logits, labelled, labels.shape), labels[tuple(labelled.T)]
    return F.interpolate(logits, size=tuple(labels.shape[-2:]), mode="bilinear", align_corners=False), labels


def _bilinear_at(logits: Tensor, where: Tensor, shape: Sequence[int]) -> Tensor:
    """What F.interpolate(align_corners=False) gives at a few places, without the rest of the map.

    Args:
        logits: (N, C, h, w).
        where: int64 (M, 3), sample, row and column in the larger map.
        shape: (N, H, W) of the larger map.

    Returns:
        (M, C).
    """
    height, width = logits.shape[-2:]
    pixels = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])

    def neighbours(index: Tensor, small: int, large: int) -> tuple[Tensor, Tensor, Tensor]:
        position = ((index.to(logits.dtype) + 0.5) * (small / large) - 0.5).clamp(min=0)
        low = position.long()
        return low, (low + 1).clamp(max=small - 1), (position - low).unsqueeze(1)

    first = where[:, 0] * height
    top, bottom, down = neighbours(where[:, 1], height, shape[1])
    left, right, along = neighbours(where[:, 2], width, shape[2])
    rows = [
        torch.lerp(pixels[(first + y) * width + left], pixels[(first + y) * width + right], along)
        for y in (top, bottom)
    ]
    return torch.lerp(rows[0], rows[1], down)


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
