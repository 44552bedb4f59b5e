"""One loss a file, each as a function and a module."""

from __future__ import annotations

from training.losses.gated_crf import GatedCRFLoss, Kernel, gated_crf_loss
from training.losses.partial_cross_entropy import (
    PartialCrossEntropyLoss,
    class_weights_from_counts,
    partial_cross_entropy,
)

__all__ = [
    "GatedCRFLoss",
    "Kernel",
    "PartialCrossEntropyLoss",
    "class_weights_from_counts",
    "gated_crf_loss",
    "partial_cross_entropy",
]
