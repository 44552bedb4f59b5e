"""Second stage of `tags` and `sfc`: a segmenter on pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.cam.correction import corrected_labels
from training.losses import GatedCRFLoss, Kernel, PartialCrossEntropyLoss
from training.losses.self_correspondence import SelfCorrespondenceLoss
from training.methods.base import IMAGENET_MEAN, IMAGENET_STD, Batch, Method, MethodContext, start_reached, to_units
from training.methods.tag_settings import TagsSettings
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import SegmentationNetwork

_KERNEL, _RADIUS = Kernel(1.0, {"xy": 6.0, "rgb": 0.4}), 5


class PseudoLabels(Method):
    """Cross-entropy where a pseudo-label is sure; with a weight also the Gated CRF loss, self correspondence.

    Args:
        settings: From the recipe.
        context: Of the run.

    Raises:
        RecipeError: Self correspondence is asked for and there is no classifier whose maps it could follow.
    """

    teacher_option = "method.correction"

    def __init__(self, settings: TagsSettings, context: MethodContext) -> None:
        super().__init__()
        self.settings, self.preprocessing = settings, context.preprocessing
        self.cross_entropy = PartialCrossEntropyLoss(context.class_weights(settings.class_weights))
        self.regulariser = SegmentationRegulariser(context)
        self.needs_teacher = settings.correction is not None
        self.correspondence = SelfCorrespondenceLoss(settings.samples, settings.correspondence)
        self.class_maps = context.class_maps
        if settings.correspondence_weight and self.class_maps is None:
            raise RecipeError(
                ["method.correspondence_weight: needs the first stage's maps; give build_method class_maps"]
            )

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The term `pseudo_ce`, and with a weight `gated_crf` and `correspondence`; see `Method.forward`."""
        logits = network(batch.image)
        terms = {"pseudo_ce": self.cross_entropy(logits, self._labels(batch, progress))}
        if self.settings.crf_weight and start_reached(progress, self.settings.crf_start):
            terms["gated_crf"] = self.settings.crf_weight * self.regulariser(logits, batch)
        if self.settings.correspondence_weight:
            terms["correspondence"] = self.settings.correspondence_weight * self._correspondence(network, batch, logits)
        return terms

    def _correspondence(self, network: SegmentationNetwork, batch: Batch, logits: Tensor) -> Tensor:
        """SCD between the image and a shrunken copy; the first stage's maps say which positions are alike."""
        assert self.class_maps is not None, "checked when this was made"
        small = shrunk_view(batch.image, self.settings.small_view, network.stride)
        with torch.no_grad():
            maps, small_maps = (self.class_maps(view, batch.tags) for view in (batch.image, small))
        loss: Tensor = self.correspondence(maps, small_maps, logits, network(small), batch.valid)
        return loss

    def _labels(self, batch: Batch, progress: float) -> Tensor:
        correction = self.settings.correction
        if correction is None or not start_reached(progress, correction.start):
            return batch.labels
        assert self.teacher is not None, "set_teacher is called before training"
        with torch.no_grad():
            logits = self.teacher(batch.image)
        threshold = correction.threshold_at(progress)
        return corrected_labels(batch.labels, logits, batch.tags, batch.valid, threshold)


def shrunk_view(image: Tensor, factor: float, stride: int) -> Tensor:
    """A smaller copy, its sides rounded to the stride, which is the least.

    Args:
        image: (N, 3, H, W).
        factor: Below 1.
        stride: Of the encoder.
    """
    sides = [max(stride, round(factor * side / stride) * stride) for side in image.shape[-2:]]
    return F.interpolate(image, size=sides, mode="bilinear", align_corners=True)


class SegmentationRegulariser(torch.nn.Module):
    """The Gated CRF loss on logits as they are, with this project's kernel for short runs (docs/results.md).

    Args:
        context: Of the run.
    """

    def __init__(self, context: MethodContext) -> None:
        super().__init__()
        self.preprocessing = context.preprocessing
        self.loss = GatedCRFLoss([_KERNEL], _RADIUS)

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar, of logits (N, C, h, w) that are a whole fraction of the image's size."""
        mean, std = (torch.tensor(v, device=logits.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
        rgb = to_units(batch.image.float(), self.preprocessing, mean, std)
        size = (logits.shape[-2], logits.shape[-1])
        rgb = F.adaptive_avg_pool2d(rgb, size)
        valid = F.adaptive_avg_pool2d(batch.valid[:, None].float(), size)
        loss: Tensor = self.loss(logits.float().softmax(dim=1), {"rgb": rgb}, mask_src=valid)
        return loss
