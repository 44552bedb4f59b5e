"""How losses combine and when they switch on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from training.methods.base import Batch, Method, MethodContext
from training.methods.cam_methods import CamMethod
from training.methods.dfr import DFR
from training.methods.gated_crf import GatedCRF
from training.methods.partial_ce import PartialCE
from training.methods.pseudo_labels import PseudoLabels
from training.methods.settings import (
    DFRSettings,
    MethodSettings,
    PartialCESettings,
    SoftLabelSettings,
    SupervisedSettings,
)
from training.methods.soft_labels import SoftLabels
from training.methods.supervised import Supervised
from training.methods.tag_settings import TagsSettings, TSCDSettings
from training.methods.tscd import TSCD
from wsss_deploy.card import Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks.encoder import Encoder

__all__ = ["Batch", "Method", "MethodContext", "build_method"]


def build_method(
    settings: MethodSettings,
    num_classes: int,
    preprocessing: Preprocessing,
    class_counts: Sequence[int] | None = None,
    encoder: Encoder | None = None,
    decoder: nn.Module | None = None,
    class_maps: Callable[[Tensor, Tensor], Tensor] | None = None,
    cams: CamMethod | None = None,
) -> Method:
    """The method that a recipe asks for.

    Args:
        settings: The recipe's `method`.
        num_classes: Channels of the logits.
        preprocessing: Normalisation of the images in a batch.
        class_counts: Labelled pixels per class over the training split; needed for `class_weights: counts`.
        encoder: Of the network; needed by methods whose heads sit on its maps.
        decoder: Of the network; needed by `dfr` with `features: decoder`.
        class_maps: See `MethodContext`; needed by `tags` and `sfc` with `correspondence_weight`.
        cams: Gives the CAMs of `tscd`; needed where its `cams` are of kind "shared_feature".

    Raises:
        RecipeError: Class weights are asked for without counts, heads without an encoder, or correspondence or shared
            features without a classifier.
    """
    counts = None if class_counts is None else tuple(class_counts)
    context = MethodContext(num_classes, preprocessing, counts, encoder, decoder, class_maps)
    if isinstance(settings, SupervisedSettings):
        return Supervised(settings, context)
    if isinstance(settings, PartialCESettings):
        return PartialCE(settings, context)
    if isinstance(settings, TagsSettings):
        return PseudoLabels(settings, context)
    if isinstance(settings, TSCDSettings):
        if encoder is None:
            raise RecipeError(["method.name: 'tscd' puts heads on the encoder; give build_method the network's"])
        return TSCD(settings, context, encoder, cams)
    if isinstance(settings, DFRSettings):
        return DFR(settings, context)
    if isinstance(settings, SoftLabelSettings):
        return SoftLabels(settings, context)
    return GatedCRF(settings, context)
