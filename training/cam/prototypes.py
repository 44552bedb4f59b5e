"""Classifier CAMs smoothed along pixel correlation, and CAMs from class prototypes (SFC).

Zhao et al., "SFC: Shared Feature Calibration in Weakly Supervised Semantic Segmentation", AAAI 2024, arXiv
2401.11719; pixel correlation after SEAM (CVPR 2020). Maps here have a background channel, 0. Everything runs in float32
at least: the 1e-5 of the norms and column sums vanishes in half precision. Decisions: docs/tags.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.cam.maps import pool_scores
from wsss_deploy.errors import UsageError

EPSILON = 1e-5
PUBLISHED_SIDES = (128, 128, 256, 256)


def unit_vectors(maps: Tensor) -> Tensor:
    """Vectors over channels (dim 1) divided by their length plus 1e-5."""
    unit: Tensor = maps / (maps.norm(dim=1, keepdim=True) + EPSILON)
    return unit


def classifier_cams(scores: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Normalised CAMs with a background channel.

    Positive part, divided by each map's maximum plus 1e-5; background is 1 minus the largest class, absent classes
    included. Differentiable, the maxima too.

    Args:
        scores: Maps of class scores (N, K, h, w).
        size: Height and width of the result (bilinear, aligned corners).
        mask: (N, K + 1, *size), which channels count where; None leaves all.

    Returns:
        (N, K + 1, *size). A class that scores nowhere above 0 is 0 everywhere.
    """
    maps = scores.relu()
    maps = maps / (maps.amax(dim=(2, 3), keepdim=True) + EPSILON)
    background = 1 - maps.amax(dim=1, keepdim=True)
    out = F.interpolate(torch.cat([background, maps], dim=1), size=size, mode="bilinear", align_corners=True)
    return out if mask is None else out * mask


def pixel_correlation(cams: Tensor, embedding: Tensor, steps: int = 2) -> Tensor:
    """CAMs averaged over similar positions; not renormalised afterwards.

    The similarity is the positive part of the embeddings' cosine, each column divided by its sum.

    Args:
        cams: (N, C, h, w).
        embedding: (N, D, h, w).
        steps: How often the average is taken; the release has 2.

    Returns:
        (N, C, h, w).
    """
    unit = unit_vectors(embedding).flatten(2)
    similarity = torch.einsum("ndi,ndj->nij", unit, unit).relu()
    similarity = similarity / (similarity.sum(dim=1, keepdim=True) + EPSILON)
    flat = cams.flatten(2)
    for _ in range(steps):
        flat = flat @ similarity
    return flat.reshape(cams.shape)


def seeds(cams: Tensor, mask: Tensor, background_weight: float = 0.3) -> Tensor:
    """One-hot seeds: the class that wins a position, with the background weighed down; no gradient.

    Args:
        cams: (N, C, h, w), channel 0 the background.
        mask: Where a channel may have seeds: (N, C, h, w), or (N, C, 1, 1) for presence alone.
        background_weight: Factor of channel 0.

    Returns:
        (N, C, h, w) of 0 and 1 (times the mask); ties go to the lower class.
    """
    weighed = torch.cat([cams[:, :1] * background_weight, cams[:, 1:]], dim=1).detach()
    winners = F.one_hot(weighed.argmax(dim=1), cams.shape[1]).permute(0, 3, 1, 2)
    return winners.to(cams.dtype) * mask


def prototypes(features: Tensor, seed_maps: Tensor) -> Tensor:
    """Mean feature over each class's seeds, per image; the divisor is all positions, which a cosine does not see.

    Args:
        features: (N, D, h, w).
        seed_maps: (N, C, h, w).

    Returns:
        (N, C, D); zero where a class has no seed.
    """
    return torch.einsum("nchw,ndhw->ncd", seed_maps, features) / features[0, 0].numel()


def prototype_cams(features: Tensor, class_prototypes: Tensor) -> Tensor:
    """Positive part of `prototype_cosines`."""
    return prototype_cosines(features, class_prototypes).relu()


def prototype_cosines(features: Tensor, class_prototypes: Tensor) -> Tensor:
    """Cosine of every position with every class's prototype.

    Args:
        features: (N, D, h, w).
        class_prototypes: (N, C, D).

    Returns:
        (N, C, h, w); 0 for a class without seeds.
    """
    flat = features.flatten(2)
    dots = torch.einsum("ncd,ndp->ncp", class_prototypes, flat)
    lengths = class_prototypes.norm(dim=2)[:, :, None] * flat.norm(dim=1)[:, None]
    cosines: Tensor = (dots / lengths.clamp(min=1e-8)).reshape(*dots.shape[:2], *features.shape[-2:])
    return cosines


def normalise_by_peak(cams: Tensor) -> Tensor:
    """Each map divided by its maximum plus 1e-5; the gradient flows through the maximum."""
    return cams / (cams.amax(dim=(2, 3), keepdim=True) + EPSILON)


@dataclass(frozen=True)
class SharedFeatureMaps:
    """What `SharedFeatureHead` gives for one view.

    Attributes:
        scores: Image scores (N, K).
        classifier: Classifier CAMs before smoothing (N, K + 1, h, w).
        smoothed: M_W, after pixel correlation.
        prototypes: (N, K + 1, D).
        prototype: M_P, prototype CAMs.
    """

    scores: Tensor
    classifier: Tensor
    smoothed: Tensor
    prototypes: Tensor
    prototype: Tensor


class SharedFeatureHead(nn.Module):
    """Classifier, hierarchical feature, pixel correlation and prototypes over four levels of any encoder.

    Plain ViTs give the blocks at 1/4, 1/2, 3/4 and the end of their depth in place of the four stages of a CNN.
    Levels pass stop-gradients on their way into the hierarchical feature, so that the prototype loss teaches the
    side layers and, through the smoothed CAMs, the last level alone.

    Args:
        channels: Channels of the levels, fine to coarse.
        classes: Foreground classes K.
        sides: Output channels of the side layers.
        background_weight: See `seeds`.
        pooling: Part of a map's cells whose mean is the image's score; the release has 1, the average.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        sides: Sequence[int] = PUBLISHED_SIDES,
        background_weight: float = 0.3,
        pooling: float = 1.0,
    ) -> None:
        super().__init__()
        if len(channels) != len(sides):
            raise UsageError(f"{len(channels)} levels and {len(sides)} side widths; expected one width a level")
        self.background_weight, self.pooling = background_weight, pooling
        self.classifier = nn.Conv2d(channels[-1], classes, 1, bias=False)
        self.side = nn.ModuleList(
            nn.Conv2d(count, width, 1, bias=False) for count, width in zip(channels, sides, strict=True)
        )
        self.embed = nn.Conv2d(3 + channels[-1], channels[-1], 1, bias=False)

    def forward(self, image: Tensor, levels: Sequence[Tensor], mask: Tensor) -> SharedFeatureMaps:
        """All maps of one view.

        Args:
            image: Normalised (N, 3, H, W).
            levels: Encoder maps, fine to coarse.
            mask: Validity times presence (N, K + 1, h, w) on the size of the second coarsest level.
        """
        with torch.autocast(image.device.type, enabled=False):
            dtype = torch.promote_types(image.dtype, torch.float32)
            levels = [level.to(dtype) for level in levels]
            mask = mask.to(dtype)
            scores = self.classifier(levels[-1])
            size = (levels[-2].shape[-2], levels[-2].shape[-1])
            plain = classifier_cams(scores, size, mask)
            feature = self.hierarchical(levels, size)
            smoothed = pixel_correlation(plain, self._embedding(image.to(dtype), levels[-1], size))
            return self.maps_of(pool_scores(scores, self.pooling), plain, smoothed, feature, mask)

    def maps_of(
        self, scores: Tensor, plain: Tensor, smoothed: Tensor, feature: Tensor, seed_mask: Tensor
    ) -> SharedFeatureMaps:
        """Seeds, prototypes and their CAMs from smoothed CAMs."""
        found = prototypes(feature, seeds(smoothed, seed_mask, self.background_weight))
        return SharedFeatureMaps(scores, plain, smoothed, found, prototype_cams(feature, found))

    def hierarchical(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """All levels behind stop-gradients, projected, of unit length each, side by side (N, sum of sides, *size)."""
        parts = [unit_vectors(layer(level.detach())) for layer, level in zip(self.side, levels, strict=True)]
        return torch.cat(
            [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts], dim=1
        )

    def _embedding(self, image: Tensor, last: Tensor, size: tuple[int, int]) -> Tensor:
        small = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        last = F.interpolate(last, size=size, mode="bilinear", align_corners=True)
        embedding: Tensor = self.embed(torch.cat([small, last], dim=1))
        return embedding

    @torch.no_grad()
    def flip_fused(self, image: Tensor, levels: Sequence[Tensor], presence: Tensor) -> tuple[Tensor, Tensor]:
        """Inference on images and their mirrors: class scores, levels, images of a pair are added before anything else.

        Unlike training, the CAMs are not masked by presence before the smoothing; only seeds are.

        Args:
            image: (2 N, 3, H, W), images and then their mirrors.
            levels: Encoder maps of it.
            presence: (N, K), 1 where present.

        Returns:
            M_W and M_P, (N, K + 1, h, w) each.
        """
        with torch.autocast(image.device.type, enabled=False):
            levels = [level.float() for level in levels]
            size = (levels[-2].shape[-2], levels[-2].shape[-1])
            scores = _fold(self.classifier(levels[-1]))
            feature = _fold(self.hierarchical(levels, size))
            plain = classifier_cams(scores, size)
            smoothed = pixel_correlation(plain, self._embedding(_fold(image.float()), _fold(levels[-1]), size))
            mask = F.pad((presence == 1).float(), (1, 0), value=1.0)[:, :, None, None]
            maps = self.maps_of(pool_scores(scores, self.pooling), plain, smoothed, feature, mask)
            return maps.smoothed, maps.prototype


def _fold(maps: Tensor) -> Tensor:
    straight, mirrored = maps.chunk(2)
    return straight + mirrored.flip(3)


def fuse_scales(cams: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """CAMs of several scales as one: raised, summed, divided by the peak; then foreground twice, background + 0.4.

    Args:
        cams: Maps (N, C, h, w), channel 0 the background.
        size: Height and width of the result (bilinear, align_corners=False).

    Returns:
        (N, C, *size), from 0 to about 2.
    """
    raised = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in cams]
    total = normalise_by_peak(torch.stack(raised).sum(dim=0))
    return torch.cat([total[:, :1] + 0.4, 2 * total[:, 1:]], dim=1)


def fuse_kinds(classifier: Tensor, prototype: Tensor, weight: float = 0.7) -> Tensor:
    """M_W + weight * M_P; the paper's weight is 1, the released script's 0.7.

    Args:
        classifier: From `fuse_scales` (N, C, H, W).
        prototype: The same for prototype CAMs.
        weight: Of the prototype CAMs.
    """
    return classifier + weight * prototype
