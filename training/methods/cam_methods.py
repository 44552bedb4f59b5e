"""First stages: methods that learn to classify images and give CAMs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.cam.head import CamHead, encode
from training.cam.image_bank import ImageBank
from training.cam.labels import present_cams
from training.cam.maps import normalise_cams
from training.cam.prototypes import SharedFeatureHead, SharedFeatureMaps, fuse_kinds, fuse_scales
from training.losses.shared_feature import (
    bank_term,
    classification_loss,
    distribution_coefficients,
    prototype_consistency,
    scale_consistency,
)
from training.methods.base import Batch, Method
from training.methods.tag_settings import CamSettings, SharedFeatureSettings
from wsss_deploy.networks import SegmentationNetwork
from wsss_deploy.networks.encoder import Encoder


class CamModel(nn.Module, ABC):
    """What gives class activation maps once it is trained.

    Args:
        classes: Foreground classes K.

    Attributes:
        knows_background: Whether one minus the sum of its maps is the background's probability.
        head: The classifier, whose tensors are kept when the training is over.
    """

    head: nn.Module
    knows_background = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    @abstractmethod
    def cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """CAMs of whole images.

        Args:
            encoder: In evaluation mode.
            image: Normalised (N, 3, H, W).
            tags: (N, K), 1 where present.

        Returns:
            (N, K, H, W) in [0, 1]; without a background channel.
        """

    def class_maps(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Maps whose vectors tell positions of one class from those of others, for self correspondence.

        Args as in `cams`; returns (N, any number, any size), at least 0. The CAMs, where a kind has nothing better.
        """
        return self.cams(encoder, image, tags)

    def prototype_cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor | None:
        """What prototypes of the image's own classes say alone, to be looked at; args and shape as in `cams`.

        None: this kind has no prototypes, or found no position to make them from.
        """
        return None


@dataclass(frozen=True)
class TaggedImages:
    """What a classifier learns from in a step: images (N, 3, S, S), valid (N, S, S), tags (N, K)."""

    image: Tensor
    valid: Tensor
    tags: Tensor


class CamMethod(CamModel, Method):
    """One that learns with the encoder, batch by batch; alone, or within a single stage that has the encoder's maps."""

    @abstractmethod
    def indices(self, encoder: Encoder) -> list[int]:
        """Blocks or stages whose maps `terms` and `view_cams` read, as timm counts."""

    def images(self, batch: Batch) -> TaggedImages:
        """The batch's images, and behind them what the method adds to them; called once a step."""
        return TaggedImages(batch.image, batch.valid, batch.tags[:, 1:])

    @abstractmethod
    def terms(self, encoder: Encoder, images: TaggedImages, maps: dict[int, Tensor]) -> dict[str, Tensor]:
        """Weighted loss terms.

        Args:
            encoder: For views that the method makes itself.
            images: From `images`.
            maps: Encoder maps of these by `indices`.
        """

    @abstractmethod
    def view_cams(
        self, encoder: Encoder, image: Tensor, maps: dict[int, Tensor], valid: Tensor, tags: Tensor
    ) -> Tensor:
        """CAMs of present classes as one view shows them, with gradient.

        Args:
            encoder: Whose maps they are.
            image: Normalised (N, 3, H, W).
            maps: Encoder maps of it by `indices`.
            valid: bool (N, S, S), of any size.
            tags: (N, K), 1 where present.

        Returns:
            (N, K, h, w) in [0, 1].
        """

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms of the classifier alone; see `Method.forward`."""
        images = self.images(batch)
        return self.terms(network.encoder, images, encode(network.encoder, images.image, self.indices(network.encoder)))


class ClassifierCams(CamMethod):
    """Multi-label classification through 1x1 classifiers on encoder maps.

    Args:
        settings: From the recipe.
        encoder: Tells channels.
        num_classes: With background.
    """

    def __init__(self, settings: CamSettings, encoder: Encoder, num_classes: int) -> None:
        super().__init__(num_classes - 1)
        self.settings = settings
        self.head: CamHead = CamHead(encoder, num_classes - 1, settings.depths, settings.pooling)

    def indices(self, encoder: Encoder) -> list[int]:
        """Of the classifiers' depths; see `CamMethod.indices`."""
        return self.head.indices

    def terms(self, encoder: Encoder, images: TaggedImages, maps: dict[int, Tensor]) -> dict[str, Tensor]:
        """The term `classification`, the sum over depths; see `CamMethod.terms`."""
        scores = self.head(maps)
        losses = [classification_loss(self.head.pooled(part, images.valid), images.tags) for part in scores.values()]
        return {"classification": torch.stack(losses).sum()}

    def view_cams(
        self, encoder: Encoder, image: Tensor, maps: dict[int, Tensor], valid: Tensor, tags: Tensor
    ) -> Tensor:
        """Scores at the depth nearest to `settings.depth`, normalised; see `CamMethod.view_cams`."""
        index = self.head.cam_index(encoder, self.settings.depth)
        return present_cams(normalise_cams(self.head.activations(maps[index], index).float().relu()), tags)

    @torch.no_grad()
    def cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Multi-scale and flip CAMs at `settings.depth`; see `CamMethod.cams`."""
        return self.head.cams(encoder, image, self.settings.depth, self.settings.scales)

    @torch.no_grad()
    def class_maps(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """CAMs of present classes at one scale; see `CamModel.class_maps`.

        A map of an absent class is noise, which normalisation raises to 1.
        """
        return present_cams(self.head.cams(encoder, image, self.settings.depth, (1.0,)), tags)


class SharedFeatureCams(CamMethod):
    """SFC: classification on two views with an image bank, and its two consistency losses.

    Args:
        settings: From the recipe.
        encoder: Tells channels.
        num_classes: With background.
        size: Side of a crop in pixels.
        tag_counts: Training images per foreground class.
        iterations_per_epoch: Of the run.
    """

    coefficients: Tensor

    def __init__(
        self,
        settings: SharedFeatureSettings,
        encoder: Encoder,
        num_classes: int,
        size: int,
        tag_counts: tuple[int, ...],
        iterations_per_epoch: float,
    ) -> None:
        classes = num_classes - 1
        super().__init__(classes)
        self.settings = settings
        self.head: SharedFeatureHead = SharedFeatureHead(
            encoder.channels, classes, settings.sides, settings.background_weight, settings.pooling
        )
        self.bank = ImageBank(classes, size) if settings.bank_draws else None
        bank = bank_term(iterations_per_epoch, settings.bank_draws, classes, settings.bank_factor)
        found = distribution_coefficients(tag_counts, bank) if settings.coefficients else torch.ones(classes)
        self.register_buffer("coefficients", found.float(), persistent=False)

    def indices(self, encoder: Encoder) -> list[int]:
        """Of the encoder's four levels; see `CamMethod.indices`."""
        return list(encoder.indices)

    def images(self, batch: Batch) -> TaggedImages:
        """The batch, and samples from the image bank; see `CamMethod.images`."""
        own = super().images(batch)
        if self.bank is None:
            return own
        self.bank.update(own.image, own.valid, own.tags)
        drawn = self.bank.draw(self.settings.bank_draws)
        return TaggedImages(
            torch.cat([own.image, drawn.image.to(own.image)]),
            torch.cat([own.valid, drawn.valid]),
            torch.cat([own.tags, drawn.tags.to(own.tags)]),
        )

    def terms(self, encoder: Encoder, images: TaggedImages, maps: dict[int, Tensor]) -> dict[str, Tensor]:
        """The terms `classification`, `prototype` and `scale`; see `CamMethod.terms`."""
        stride = encoder.stride
        sides = [max(stride, round(side / 2 / stride) * stride) for side in images.image.shape[-2:]]
        half = F.interpolate(images.image, size=sides, mode="bilinear", align_corners=True)
        full = self._view(images.image, [maps[index] for index in encoder.indices], images.valid, images.tags)
        small = self._view(half, encoder(half), images.valid, images.tags)
        scores = [classification_loss(view.scores, images.tags) for view in (full, small)]
        terms = {"classification": (scores[0] + scores[1]) / 2}
        if self.settings.prototype_weight:
            loss = prototype_consistency(full.smoothed, full.prototype, self.coefficients)
            terms["prototype"] = self.settings.prototype_weight * loss
        if self.settings.scale_weight:
            loss = scale_consistency(full.smoothed, small.smoothed, images.tags, self.coefficients)
            terms["scale"] = self.settings.scale_weight * loss
        return terms

    def view_cams(
        self, encoder: Encoder, image: Tensor, maps: dict[int, Tensor], valid: Tensor, tags: Tensor
    ) -> Tensor:
        """M_W of the view; see `CamMethod.view_cams`."""
        levels = [maps[index] for index in encoder.indices]
        return self._view(image, levels, valid, tags).smoothed[:, 1:]

    def _view(self, image: Tensor, levels: Sequence[Tensor], valid: Tensor, tags: Tensor) -> SharedFeatureMaps:
        inside = F.interpolate(valid[:, None].to(image.dtype), size=levels[-2].shape[-2:], mode="nearest")
        # What is none of the known classes may be one that nobody named: no background then.
        background = ~tags.isnan().any(dim=1, keepdim=True)
        presence = torch.cat([background, tags == 1], dim=1).to(image.dtype)
        mask = inside * presence[:, :, None, None]
        maps: SharedFeatureMaps = self.head(image, levels, mask)
        return maps

    @torch.no_grad()
    def cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Fused classifier and prototype CAMs over scales and flips; see `CamMethod.cams`.

        The fused maps' foreground, divided by the peak that the release gives them (2 and 2 * fusion).
        """
        return self._fused(encoder, image, tags, self.settings.scales)

    @torch.no_grad()
    def class_maps(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Fused CAMs of present classes at one scale; see `CamModel.class_maps`."""
        return present_cams(self._fused(encoder, image, tags, (1.0,)), tags)

    def _fused(self, encoder: Encoder, image: Tensor, tags: Tensor, scales: Sequence[float]) -> Tensor:
        smoothed, prototype = self._kinds(encoder, image, tags, scales)
        fused = fuse_kinds(smoothed, prototype, self.settings.fusion)
        return fused[:, 1:] / (2 + 2 * self.settings.fusion)

    @torch.no_grad()
    def prototype_cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """M_P over scales and flips; see `CamModel.prototype_cams`."""
        return self._kinds(encoder, image, tags, self.settings.scales)[1][:, 1:] / 2

    def _kinds(self, encoder: Encoder, image: Tensor, tags: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
        """M_W and M_P (N, K + 1, H, W) over scales and flips."""
        size = (image.shape[-2], image.shape[-1])
        kinds: list[list[Tensor]] = [[], []]
        for scale in scales:
            sides = [max(encoder.stride, round(scale * side / encoder.stride) * encoder.stride) for side in size]
            scaled = F.interpolate(image, size=sides, mode="bicubic", align_corners=False)
            both = torch.cat([scaled, scaled.flip(3)])
            for maps, kind in zip(self.head.flip_fused(both, encoder(both), tags), kinds, strict=True):
                kind.append(maps)
        smoothed, prototype = (fuse_scales(kind, size) for kind in kinds)
        return smoothed, prototype
