"""Image tags in a single stage: TSCD (arXiv 2302.13765), on any encoder of this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.cam.attention import AffinityHead, AttentionTap, count_heads
from training.cam.head import encode, freeze
from training.cam.labels import byte_image, refined_labels
from training.cam.propagation import propagated_labels
from training.losses.attention_affinity import affinity_labels, affinity_loss
from training.losses.balanced_cross_entropy import balanced_cross_entropy
from training.losses.self_correspondence import SelfCorrespondenceLoss, scale_consistency_loss
from training.methods.base import Batch, Method, MethodContext, start_reached
from training.methods.cam_methods import CamMethod, ClassifierCams
from training.methods.label_rule import label_rule
from training.methods.pseudo_labels import SegmentationRegulariser, shrunk_view
from training.methods.tag_settings import CamSettings, TSCDSettings
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import SegmentationNetwork
from wsss_deploy.networks.encoder import Encoder


class TSCD(Method):
    """Classification; after its start also segmentation against refined CAM labels, affinity, self correspondence.

    CAMs for labels are taken in evaluation mode and by a pass of their own, without decoder: the release takes them
    in training mode, where stochastic depth acts on them.

    Args:
        settings: From the recipe.
        context: Of the run.
        encoder: Tells channels and attention; its first layers stop learning (`frozen`).
        classifier: Gives the CAMs; None is one of `settings.cams` of kind "classifier".

    Raises:
        RecipeError: Affinity is asked for and the encoder has no attention over positions, or `settings.cams` are of
            another kind and there is no classifier.
    """

    def __init__(
        self,
        settings: TSCDSettings,
        context: MethodContext,
        encoder: Encoder,
        classifier: CamMethod | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.preprocessing = settings, context.preprocessing
        freeze(encoder, settings.frozen)
        if classifier is None:
            if not isinstance(settings.cams, CamSettings):
                raise RecipeError(
                    [f"method.cams.kind: '{settings.cams.kind}' knows the training images; give build_method `cams`"]
                )
            classifier = ClassifierCams(settings.cams, encoder, context.num_classes)
        self.classifier = classifier
        self.rule = label_rule(settings.labels)
        self.correspondence = SelfCorrespondenceLoss(settings.samples, settings.correspondence)
        self.regulariser = SegmentationRegulariser(context)
        self.affinity: AffinityHead | None = None
        if settings.affinity_weight:
            AttentionTap(encoder)
            self.affinity = AffinityHead(count_heads(encoder))

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The classifier's terms, and after the start those that have a weight; see `Method.forward`."""
        encoder, tags = network.encoder, batch.tags[:, 1:]
        started = start_reached(progress, self.settings.start)
        tap = AttentionTap(encoder) if self.affinity is not None and started else None
        # With what the classifier adds, so that one pass serves all; nothing else learns from that.
        images, own = self.classifier.images(batch), len(batch.image)
        with tap or nullcontext():
            all_maps = self._maps(encoder, images.image)
        terms = self.classifier.terms(encoder, images, all_maps)
        if not started:
            return terms
        maps = {index: part[:own] for index, part in all_maps.items()}
        cams = self._cams(encoder, batch.image, tags)
        image = byte_image(batch.image.float(), self.preprocessing)
        labels = refined_labels(image, cams, tags, batch.valid, self.rule)
        affinity = None if self.affinity is None or tap is None else self.affinity(tap.logits()[:own])
        stride = encoder.reductions[-1]
        grid = (batch.image.shape[-2] // stride, batch.image.shape[-1] // stride)
        targets, start = labels, self.settings.propagation_start
        if affinity is not None and start is not None and start_reached(progress, start):
            coarse, radius = F.interpolate(cams, size=grid, mode="bilinear"), self.settings.affinity_radius
            targets = propagated_labels(image, coarse, tags, batch.valid, affinity.detach(), radius, self.rule)
        logits = network.decoder(batch.image, [maps[index] for index in encoder.indices])
        terms["segmentation"] = self.settings.segmentation_weight * balanced_cross_entropy(logits, targets)
        if affinity is not None:
            # Of labels that the affinity had no part in, so that it does not confirm itself.
            pairs = affinity_labels(labels, grid, self.settings.affinity_radius)
            terms["affinity"] = self.settings.affinity_weight * affinity_loss(affinity, pairs)
        terms |= self._small_view(network, batch, maps, cams, logits)
        if self.settings.regulariser_weight:
            terms["gated_crf"] = self.settings.regulariser_weight * self.regulariser(logits, batch)
        return terms

    def _small_view(
        self, network: SegmentationNetwork, batch: Batch, maps: dict[int, Tensor], cams: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """Terms that compare the image with a shrunken copy of itself."""
        settings, terms = self.settings, dict[str, Tensor]()
        if not (settings.correspondence_weight or settings.consistency_weight):
            return terms
        encoder, tags = network.encoder, batch.tags[:, 1:]
        image = shrunk_view(batch.image, settings.small_view, encoder.stride)
        small_maps = self._maps(encoder, image)
        small_cams = self._cams(encoder, image, tags)
        if settings.correspondence_weight:
            small = network.decoder(image, [small_maps[index] for index in encoder.indices])
            loss: Tensor = self.correspondence(cams, small_cams, logits, small)
            terms["correspondence"] = settings.correspondence_weight * loss
        if settings.consistency_weight:
            if settings.consistency == "repaired":
                views = ((batch.image, maps), (image, small_maps))
                cams, small_cams = (
                    self.classifier.view_cams(encoder, view, seen, batch.valid, tags) for view, seen in views
                )
            loss = scale_consistency_loss(cams, small_cams, settings.consistency)
            terms["consistency"] = settings.consistency_weight * loss
        return terms

    def _maps(self, encoder: Encoder, image: Tensor) -> dict[int, Tensor]:
        """What decoder and classifier read."""
        return encode(encoder, image, [*encoder.indices, *self.classifier.indices(encoder)])

    @torch.no_grad()
    def _cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        with _evaluating(encoder):
            return self.classifier.cams(encoder, image.float(), tags)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
