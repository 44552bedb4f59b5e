"""Sparse labels: cross-entropy where there is a label and nothing elsewhere."""

from __future__ import annotations

from torch import Tensor

from training.methods.base import Batch
from training.methods.sparse import SparseMethod
from wsss_deploy.networks import SegmentationNetwork


class PartialCE(SparseMethod):
    """Mean cross-entropy of the labelled pixels; see `SparseMethod`."""

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The term `partial_ce`; see `Method.forward`."""
        return self.sparse_terms(network(batch.image), batch, progress)
