"""How losses combine and when they switch on."""

from __future__ import annotations

from collections.abc import Sequence

from training.methods.base import Batch, Method, MethodContext
from training.methods.gated_crf import GatedCRF
from training.methods.partial_ce import PartialCE
from training.methods.settings import GatedCRFSettings, PartialCESettings, SupervisedSettings
from training.methods.supervised import Supervised
from wsss_deploy.card import Preprocessing

__all__ = ["Batch", "Method", "MethodContext", "build_method"]


def build_method(
    settings: SupervisedSettings | PartialCESettings | GatedCRFSettings,
    num_classes: int,
    preprocessing: Preprocessing,
    class_counts: Sequence[int] | None = None,
) -> Method:
    """The method that a recipe asks for.

    Args:
        settings: The recipe's `method`.
        num_classes: Channels of the logits.
        preprocessing: Normalisation of the images in a batch.
        class_counts: Labelled pixels per class over the training split; needed for `class_weights: counts`.

    Raises:
        RecipeError: Class weights are asked for without counts.
    """
    context = MethodContext(num_classes, preprocessing, None if class_counts is None else tuple(class_counts))
    if isinstance(settings, SupervisedSettings):
        return Supervised(settings, context)
    if isinstance(settings, PartialCESettings):
        return PartialCE(settings, context)
    return GatedCRF(settings, context)
