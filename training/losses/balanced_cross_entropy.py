"""Cross-entropy in which background and foreground weigh the same (AFA, TSCD)."""

from __future__ import annotations

import torch
from torch import Tensor

from training.losses.partial_cross_entropy import partial_cross_entropy
from wsss_deploy.card import IGNORE_INDEX


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the mean over pixels labelled 0 plus half the mean over pixels labelled above 0.

    From the released code of AFA (arXiv 2203.02664), where a batch without one of the two is NaN; here a side
    without pixels adds exactly 0.

    Args:
        logits: (N, C, h, w).
        labels: int64 (N, H, W), class 0 is the background, 255 = ignore.

    Returns:
        Scalar, float32 or float64.
    """
    background = labels.masked_fill(labels != 0, IGNORE_INDEX)
    foreground = labels.masked_fill(labels == 0, IGNORE_INDEX)
    sides = [partial_cross_entropy(logits, side) for side in (background, foreground)]
    return torch.stack(sides).sum() / 2
