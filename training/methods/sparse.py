"""What methods for sparse labels share: the labelled pixels' cross-entropy and further sources of labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cam.labels import byte_image
from training.losses import (
    PartialCrossEntropyLoss,
    absent_classes_loss,
    block_labels,
    spread_labels,
    unlabelled_blocks,
)
from training.methods.base import IMAGENET_MEAN, IMAGENET_STD, Batch, Method, MethodContext, start_reached, to_units
from training.methods.settings import SparseSettings, SpreadSettings, TeacherSettings
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.pairwise import refine
from wsss_deploy.pairwise.guides import opponent_guide
from wsss_deploy.refinement import STRONG


class SparseMethod(Method):
    """Cross-entropy of the labelled pixels; where asked for, of pseudo-labels from two further sources.

    Args:
        settings: From the recipe.
        context: Of the run.
    """

    def __init__(self, settings: SparseSettings, context: MethodContext) -> None:
        super().__init__()
        self.sparse, self.preprocessing = settings, context.preprocessing
        self.needs_teacher = settings.teacher is not None
        self.cross_entropy = PartialCrossEntropyLoss(context.class_weights(settings.class_weights))

    def sparse_terms(self, logits: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The term `partial_ce` and, where asked for and from their starts on, `absent`, `teacher` and `spread`.

        Args:
            logits: (N, C, h, w).
            batch: One training batch.
            progress: Part of the training that is done.
        """
        terms = {"partial_ce": self.cross_entropy(logits, batch.labels)}
        absent, teacher, spread = self.sparse.absent, self.sparse.teacher, self.sparse.spread
        if absent is not None:
            inside = whole_cells(batch.valid, (logits.shape[-2], logits.shape[-1]))
            terms["absent"] = absent.weight * absent_classes_loss(logits, batch.labelled, inside)
        if teacher is not None and start_reached(progress, teacher.start):
            terms["teacher"] = teacher.weight * self._teacher_term(teacher, logits, batch)
        if spread is not None and start_reached(progress, spread.start):
            terms["spread"] = spread.weight * self._spread_term(spread, logits, batch)
        return terms

    def imagenet_rgb(self, batch: Batch) -> Tensor:
        """The image in ImageNet-normalised units, so that a sigma means the same with every encoder."""
        mean, std = (torch.tensor(v, device=batch.image.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return to_units(batch.image.float(), self.preprocessing, mean, std)

    def _teacher_term(self, settings: TeacherSettings, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with the teacher's classes where it is sure, over all unlabelled pixels.

        The mean is over unlabelled pixels whether the teacher is sure or not (FixMatch, arXiv 2001.07685, eq. 4), so
        that the term grows as it becomes so. The teacher is the weights' moving average (mean teacher, arXiv
        1703.01780).
        """
        assert self.teacher is not None, "set_teacher is called before training"
        with torch.no_grad():
            scores = self.teacher(batch.image).float()
            if settings.refine:
                size = (batch.image.shape[-2], batch.image.shape[-1])
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            if self.sparse.absent is not None:
                # Of an image without any label nothing is known to be absent.
                possible = batch.labelled | ~batch.labelled.any(dim=1, keepdim=True)
                scores = scores.masked_fill(~possible[:, :, None, None], -torch.inf)
            probabilities = scores.softmax(dim=1)
            if settings.refine:
                probabilities = self._refined(probabilities, batch)
            likely, predicted = probabilities.max(dim=1)
        # Refined labels are those of the image's pixels, unrefined ones those of the logits' map.
        size = (likely.shape[-2], likely.shape[-1])
        unlabelled = unlabelled_blocks(batch.labels, size) & whole_cells(batch.valid, size)
        targets = predicted.masked_fill(~unlabelled | (likely < settings.threshold), IGNORE_INDEX)
        logits = logits.float()
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / unlabelled.sum().clamp(min=1)

    def _refined(self, probabilities: Tensor, batch: Batch) -> Tensor:
        """Probabilities (N, C, H, W) refined along the image as a model's scores are when it is used.

        What lies beyond the image in a crop has no weight; where nothing else is near, nothing is likely.
        """
        guide = opponent_guide(byte_image(batch.image.float(), self.preprocessing)).contiguous()
        refined: Tensor = refine(probabilities * batch.valid[:, None], guide, STRONG.parameters)
        # Weights sum to 1 and probabilities inside the image too, so that the sum is the weight that lay inside.
        return refined / refined.sum(dim=1, keepdim=True).clamp(min=1e-3)

    def _spread_term(self, settings: SpreadSettings, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the labels that were carried, without those that were there."""
        size = (logits.shape[-2], logits.shape[-1])
        seeds = block_labels(batch.labels, size).masked_fill(~whole_cells(batch.valid, size), IGNORE_INDEX)
        rgb = F.adaptive_avg_pool2d(self.imagenet_rgb(batch), size)
        carried = spread_labels(seeds, rgb, settings.rgb, settings.xy, settings.limit)
        unlabelled = unlabelled_blocks(batch.labels, size) & whole_cells(batch.valid, size)
        loss: Tensor = self.cross_entropy(logits, carried.masked_fill(~unlabelled, IGNORE_INDEX))
        return loss


def whole_cells(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells of a coarser map that lie fully inside the image: bool (N, H, W) to (N, h, w)."""
    return F.adaptive_avg_pool2d(valid[:, None].float(), size)[:, 0] >= 1
