"""Full masks: plain cross-entropy."""

from __future__ import annotations

from torch import Tensor

from training.losses import PartialCrossEntropyLoss
from training.methods.base import Batch, Method, MethodContext
from training.methods.settings import SupervisedSettings
from wsss_deploy.networks import SegmentationNetwork


class Supervised(Method):
    """Mean cross-entropy of all pixels whose mask is not 255.

    Args:
        settings: From the recipe.
        context: Of the run.
    """

    def __init__(self, settings: SupervisedSettings, context: MethodContext) -> None:
        super().__init__()
        self.cross_entropy = PartialCrossEntropyLoss(context.class_weights(settings.class_weights))

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The term `ce`; see `Method.forward`."""
        return {"ce": self.cross_entropy(network(batch.image), batch.labels)}
