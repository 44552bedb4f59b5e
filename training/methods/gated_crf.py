"""Sparse labels, spread to neighbours of similar colour by the Gated CRF loss (arXiv 1906.04651)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import GatedCRFLoss, Kernel
from training.methods.base import Batch, MethodContext, start_reached
from training.methods.settings import GatedCRFSettings, KernelSettings
from training.methods.sparse import SparseMethod
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.networks import SegmentationNetwork


class GatedCRF(SparseMethod):
    """Cross-entropy of the labelled pixels, and the Gated CRF loss on the same logits once its start is reached.

    The kernel sees the image in ImageNet-normalised units whatever the encoder's normalisation is, so that a sigma
    means the same with every encoder.

    Args:
        settings: From the recipe.
        context: Of the run.
    """

    def __init__(self, settings: GatedCRFSettings, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.settings = settings
        matrix = settings.compatibility
        self.gated_crf = GatedCRFLoss(
            [_kernel(kernel) for kernel in settings.kernels],
            settings.radius,
            compatibility=None if matrix is None else torch.tensor(matrix),
            one_way=settings.one_way,
            count_padding_pairs=settings.count_padding_pairs,
        )

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms `partial_ce` and, from its start on, `gated_crf`; see `Method.forward`."""
        logits = network(batch.image)
        terms = self.sparse_terms(logits, batch, progress)
        if start_reached(progress, self.settings.start):
            terms["gated_crf"] = self.settings.weight * self._pairwise(logits, batch)
        return terms

    def _pairwise(self, logits: Tensor, batch: Batch) -> Tensor:
        height, width = batch.image.shape[-2:]
        probabilities = at_size(logits, (height // self.settings.stride, width // self.settings.stride))
        rgb = self.imagenet_rgb(batch)
        valid = batch.valid[:, None] if self.settings.gate_validity else None
        unlabelled = (batch.labels == IGNORE_INDEX)[:, None] if self.settings.gate_labelled else None
        if valid is not None and unlabelled is not None:
            # The loss is per receiver; with the padding among them it would shrink with a crop's share of it.
            unlabelled = unlabelled & valid
        loss: Tensor = self.gated_crf(probabilities, {"rgb": rgb}, mask_src=valid, mask_dst=unlabelled)
        return loss


def _kernel(settings: KernelSettings) -> Kernel:
    sigmas = {"xy": settings.xy, "rgb": settings.rgb}
    return Kernel(settings.weight, {name: sigma for name, sigma in sigmas.items() if sigma is not None})


def at_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities (N, C, *size): those of a coarser map are averages, those of a finer come from raised logits."""
    logits = logits.float()
    if size[0] > logits.shape[-2]:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    probabilities = logits.softmax(dim=1)
    return probabilities if probabilities.shape[-2:] == size else F.adaptive_avg_pool2d(probabilities, size)
