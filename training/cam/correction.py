"""Pseudo-labels corrected by what a segmenter trained on them has come to believe, within what the tags allow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX


@torch.no_grad()
def corrected_labels(labels: Tensor, logits: Tensor, tags: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Fill and filter labels with a teacher's predictions among background and tagged classes.

    Where the teacher is sure, its class fills a pixel without label and takes the place of another class's label;
    elsewhere labels stay as they are. Networks fit what labels agree on before they fit the errors in them, so that a
    moving average early in training is better than its labels (ELR, arXiv 2007.00151; ADELE, arXiv 2110.03740).

    Args:
        labels: int64 (N, H, W), 255 = none.
        logits: Of the teacher (N, C, h, w).
        tags: (N, C), 1 where present; class 0, the background, is always possible.
        valid: bool (N, H, W); outside there is no label.
        threshold: Least probability, among the possible classes, of a sure prediction.

    Returns:
        int64 (N, H, W).
    """
    possible = tags == 1
    possible[:, 0] = True
    scores = logits.float().masked_fill(~possible[:, :, None, None], -torch.inf)
    small, best = scores.softmax(dim=1).max(dim=1)
    size = labels.shape[-2:]
    sure = F.interpolate(small[:, None], size=size, mode="nearest")[:, 0] >= threshold
    found = F.interpolate(best[:, None].float(), size=size, mode="nearest")[:, 0].long()
    return torch.where(sure, found, labels).masked_fill(~valid, IGNORE_INDEX)
