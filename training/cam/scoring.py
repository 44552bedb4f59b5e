"""CAMs and pseudo-labels against masks, as results of their own; no training reads these figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from training.cam.labels import plain_labels, presence, present_cams, refined_labels, sure_labels
from training.cam.pseudo_labels import PseudoLabelSource, network_image, pseudo_label
from training.cam_stage import finished_classifier, long_side_of, whole_image_cams
from training.data.dataset import DataSource
from training.evaluate import Evaluator
from training.methods.label_rule import label_rule
from training.methods.tag_settings import TagsSettings, TSCDSettings
from training.recipe import Recipe
from training.token_stage import Labels
from training.trainer import make_fabric
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.networks import encoder_preprocessing

BACKGROUNDS = tuple(round(0.05 * step, 2) for step in range(2, 18))


def score_labels(source: DataSource, folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Pseudo-labels where they are sure.

    Args:
        source: With masks.
        folder: Of the label maps.
        names: Images; those without a pseudo-label or a mask are left out.

    Returns:
        `miou` over sure pixels, `sure` their part of all, `images`.
    """
    labelled = PseudoLabelSource(source, folder)
    evaluator, sure, images = Evaluator(source.classes), 0.0, 0
    for name in names:
        if not labelled.path(name).is_file() or "masks" not in source.kinds(name):
            continue
        found, truth = labelled.load_labels(name, "masks"), source.load_labels(name, "masks")
        sure += _update(evaluator, found, truth)
        images += 1
    return {"miou": evaluator.result().miou, "sure": sure / images, "images": images}


def score_cams(
    source: DataSource, recipe: Recipe, folder: Path, names: Sequence[str], device: str | None = None
) -> dict[str, float]:
    """Plainly thresholded CAMs of a run's first stage, or of `tscd` as it ended, at the best background score.

    Nothing is trained or written.

    Args:
        source: With masks and tags.
        recipe: Of the run.
        folder: The run's.
        names: Images with masks.
        device: In place of the recipe's.

    Returns:
        `miou`, the `background` score at which it is best on these very images, `images`.
    """
    cams_of, _ = _classifier(source, recipe, folder, device)
    evaluators = [Evaluator(source.classes) for _ in BACKGROUNDS]
    for name in names:
        tags, truth = source.tags(name) or (), source.load_labels(name, "masks")
        cams = cams_of(source.load_image(name), tags)
        cams = F.interpolate(cams, size=truth.shape, mode="bilinear", align_corners=False)
        own = present_cams(cams, presence(tags, cams.shape[1]))
        for evaluator, background in zip(evaluators, BACKGROUNDS, strict=True):
            labels = plain_labels(own, background)
            evaluator.update(labels[0].numpy().astype(np.uint8), truth)
    scores = [evaluator.result().miou for evaluator in evaluators]
    best = int(np.argmax(scores))
    return {"miou": scores[best], "background": BACKGROUNDS[best], "images": len(names)}


def score_made_labels(
    source: DataSource, recipe: Recipe, folder: Path, names: Sequence[str], device: str | None = None
) -> dict[str, float]:
    """Labels that the run's rule makes of whole images' CAMs, where they are sure: for `tscd`, which keeps none.

    With `propagation_start` these are the labels that teach the affinity; what the segmentation learns from after that
    start, spread along it, is not scored.

    Args as in `score_cams`, returns as `score_labels`.
    """
    assert isinstance(recipe.method, TagsSettings | TSCDSettings)
    cams_of, knows_background = _classifier(source, recipe, folder, device)
    rule, make = label_rule(recipe.method.labels), sure_labels if knows_background else refined_labels
    evaluator, sure = Evaluator(source.classes), 0.0
    for name in names:
        image, tags, truth = source.load_image(name), source.tags(name) or (), source.load_labels(name, "masks")
        found = pseudo_label(image, cams_of(image, tags), tags, rule, make)
        sure += _update(evaluator, found, truth)
    return {"miou": evaluator.result().miou, "sure": sure / len(names), "images": len(names)}


def _update(evaluator: Evaluator, found: Labels, truth: Labels) -> float:
    """Count sure pixels; their part of all."""
    known = found != IGNORE_INDEX
    evaluator.update(np.where(known, found, 0).astype(np.uint8), np.where(known, truth, IGNORE_INDEX))
    return float(known.mean())


def _classifier(
    source: DataSource, recipe: Recipe, folder: Path, device: str | None
) -> tuple[Callable[[Labels, Sequence[int]], Tensor], bool]:
    """CAMs of an image and its tags, (1, K, h, w), and whether they know the background."""
    encoder, method = finished_classifier(recipe, folder, len(source.classes), device)
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    here = recipe if device is None else recipe.model_copy(update={"device": device})
    autocast = make_fabric(here).autocast

    def cams_of(image: Labels, tags: Sequence[int]) -> Tensor:
        with autocast():
            view = network_image(image, long_side_of(recipe), preprocessing)
            return whole_image_cams(encoder, method, view, tags).cpu()

    return cams_of, method.knows_background
