"""One loss a file, each as a function and a module."""

from __future__ import annotations

from training.losses.absent_classes import absent_classes_loss
from training.losses.dense_energy import dense_pair_energy
from training.losses.dynamic_feature import (
    block_labels,
    feature_consistency_loss,
    feature_smoothness_loss,
    pair_targets,
    unlabelled_blocks,
)
from training.losses.gated_crf import GatedCRFLoss, Kernel, gated_crf_loss
from training.losses.label_spreading import spread_labels
from training.losses.partial_cross_entropy import (
    PartialCrossEntropyLoss,
    class_weights_from_counts,
    partial_cross_entropy,
)
from training.losses.potts import collision_cross_entropy, potts, potts_energy, soft_labels

__all__ = [
    "GatedCRFLoss",
    "Kernel",
    "PartialCrossEntropyLoss",
    "absent_classes_loss",
    "block_labels",
    "class_weights_from_counts",
    "collision_cross_entropy",
    "dense_pair_energy",
    "feature_consistency_loss",
    "feature_smoothness_loss",
    "gated_crf_loss",
    "pair_targets",
    "partial_cross_entropy",
    "potts",
    "potts_energy",
    "soft_labels",
    "spread_labels",
    "unlabelled_blocks",
]
