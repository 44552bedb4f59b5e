"""CAMs and pseudo-labels against masks, as results of their own; no training reads these figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.nn import functional as F

from training.cam.labels import plain_labels, presence, present_cams
from training.cam.pseudo_labels import PseudoLabelSource, network_image
from training.cam_stage import long_side_of, trained_classifier, whole_image_cams
from training.data.dataset import DataSource
from training.evaluate import Evaluator
from training.recipe import Recipe
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
        known = found != IGNORE_INDEX
        sure += float(known.mean())
        images += 1
        evaluator.update(np.where(known, found, 0).astype(np.uint8), np.where(known, truth, IGNORE_INDEX))
    return {"miou": evaluator.result().miou, "sure": sure / images, "images": images}


def score_cams(source: DataSource, recipe: Recipe, folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Plainly thresholded CAMs of a run's first stage, at the best background score.

    Args:
        source: With masks and tags.
        recipe: Of the run.
        folder: The run's.
        names: Images with masks.

    Returns:
        `miou`, the `background` score at which it is best on these very images, `images`.
    """
    encoder, method = trained_classifier(recipe, source, folder)
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    autocast = make_fabric(recipe).autocast
    evaluators = [Evaluator(source.classes) for _ in BACKGROUNDS]
    for name in names:
        image, tags, truth = source.load_image(name), source.tags(name) or (), source.load_labels(name, "masks")
        view = network_image(image, long_side_of(recipe), preprocessing)
        with autocast():
            cams = whole_image_cams(encoder, method, view, tags).cpu()
        cams = F.interpolate(cams, size=truth.shape, mode="bilinear", align_corners=False)
        own = present_cams(cams, presence(tags, cams.shape[1]))
        for evaluator, background in zip(evaluators, BACKGROUNDS, strict=True):
            labels = plain_labels(own, background)
            evaluator.update(labels[0].numpy().astype(np.uint8), truth)
    scores = [evaluator.result().miou for evaluator in evaluators]
    best = int(np.argmax(scores))
    return {"miou": scores[best], "background": BACKGROUNDS[best], "images": len(names)}
