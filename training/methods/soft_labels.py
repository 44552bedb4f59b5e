"""Soft self-labelling (arXiv 2507.01721): pseudo-labels are distributions that solve a Potts problem each iteration."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from training.losses import block_labels, collision_cross_entropy, soft_labels, unlabelled_blocks
from training.methods.base import Batch, MethodContext, start_reached
from training.methods.settings import SoftLabelSettings
from training.methods.sparse import SparseMethod, whole_cells
from wsss_deploy.networks import SegmentationNetwork


class SoftLabels(SparseMethod):
    """Cross-entropy of the labelled pixels and, from its start on, collision cross-entropy with soft pseudo-labels.

    The two alternate within an iteration: pseudo-labels are found for the network as it is, then the network takes
    one step towards them. They live on the logits' map.

    Args:
        settings: From the recipe.
        context: Of the run.
    """

    def __init__(self, settings: SoftLabelSettings, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.settings = settings

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms `partial_ce` and, from its start on, `soft_labels`; see `Method.forward`."""
        logits = network(batch.image)
        terms = self.sparse_terms(logits, batch, progress)
        if start_reached(progress, self.settings.start):
            terms["soft_labels"] = self.settings.weight * self._self_labelling(logits, batch)
        return terms

    def _self_labelling(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the unlabelled pixels inside the image."""
        settings, size = self.settings, (logits.shape[-2], logits.shape[-1])
        probabilities = logits.float().softmax(dim=1)
        inside = whole_cells(batch.valid, size)
        seeds = block_labels(batch.labels, size)
        labels = soft_labels(
            probabilities,
            seeds,
            F.adaptive_avg_pool2d(self.imagenet_rgb(batch), size),
            eta=settings.weight,
            strength=settings.potts,
            rgb=settings.rgb,
            relaxation=settings.relaxation,
            steps=settings.steps,
            rate=settings.rate,
            valid=inside,
        )
        free = inside & unlabelled_blocks(batch.labels, size)
        return (collision_cross_entropy(labels, probabilities) * free).sum() / free.sum().clamp(min=1)
