"""Sparse labels: cross-entropy where there is a label and nothing elsewhere."""

from __future__ import annotations

from torch import Tensor

from training.losses import PartialCrossEntropyLoss
from training.methods.base import Batch, Method, MethodContext
from training.methods.settings import PartialCESettings
from wsss_deploy.networks import SegmentationNetwork


class PartialCE(Method):
    """Mean cross-entropy of the labelled pixels.

    Args:
        settings: From the recipe.
        context: Of the run.
    """

    def __init__(self, settings: PartialCESettings, context: MethodContext) -> None:
        super().__init__()
        self.cross_entropy = PartialCrossEntropyLoss(context.class_weights(settings.class_weights))

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The term `partial_ce`; see `Method.forward`."""
        return {"partial_ce": self.cross_entropy(network(batch.image), batch.labels)}
