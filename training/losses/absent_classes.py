"""What the classes that nobody labelled in an image say about each of its pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_NONE = -1e30


def absent_classes_loss(logits: Tensor, present: Tensor, valid: Tensor) -> Tensor:
    r"""Cross-entropy of every pixel with the set of its image's classes.

    .. math:: L = mean_i -log \sum_{c \in present} P_i^c

    A sparse label tells one pixel its class, and all pixels of the image which classes they do not have. This is the
    likelihood of candidate labels (Jin and Ghahramani, NeurIPS 2002): it says nothing about which of the present
    classes a pixel has.

    Args:
        logits: (N, C, h, w).
        present: bool (N, C), the classes that the image may hold. An image with none is left out.
        valid: bool (N, h, w), the pixels that count.

    Returns:
        Scalar, computed in float32 at least; 0 without a pixel that counts.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = valid & present.any(dim=1)[:, None, None]
    # An image without classes would give infinity times zero in the gradient.
    possible = present | ~present.any(dim=1, keepdim=True)
    possible = possible[:, :, None, None]
    # Not infinity: with all classes present the sum over the absent ones would have no gradient but NaN.
    inside = torch.logsumexp(scores.masked_fill(~possible, _NONE), dim=1)
    outside = torch.logsumexp(scores.masked_fill(possible, _NONE), dim=1)
    # Exact where nearly all mass is on one side.
    loss = F.softplus(outside - inside).masked_fill(~counted, 0)
    return loss.sum() / counted.sum().clamp(min=1)
