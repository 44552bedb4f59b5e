"""First stage of methods for sparse labels with `propagate`: labels of a few pixels become labels of most, on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.cam.labels import sure_labels
from training.cam.pseudo_labels import PseudoLabelSource, network_image, pseudo_label, write_label
from training.cam_stage import LABELS, STAGE, begin_labels, label_key
from training.data.dataset import DataSource, has_background
from training.data.pipeline import TrainingSet
from training.data.transforms import grow_points
from training.methods.label_rule import label_rule
from training.methods.settings import PartialCESettings
from training.methods.tag_settings import PropagationSettings
from training.recipe import Recipe
from training.state import CHECKPOINT, load_checkpoint
from training.token_stage import Labels, default_long_side, fitted_tokens, pretrained_encoder
from training.trainer import make_fabric
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError
from wsss_deploy.networks import encoder_preprocessing

_log = logging.getLogger(__name__)


def add_propagated_labels(
    recipe: Recipe,
    settings: PropagationSettings,
    source: DataSource,
    given: TrainingSet,
    folder: Path,
    show: bool = True,
) -> PseudoLabelSource | None:
    """The data set with labels of most pixels as masks of its labelled images; those that were given come first.

    Every class of an image but the background is taken to be among its labels, as with a point an object; an image with
    a mask keeps it. An image whose label map is empty gets an empty one.

    Args:
        recipe: Of the whole run.
        settings: Its method's `propagate`.
        source: The data set.
        given: Its labelled training images.
        folder: Run folder; the classifiers and `pseudo_labels/` are kept in it.
        show: Progress on the terminal.

    Returns:
        None where the features do not tell the classes apart (`PropagationSettings.least`).

    Raises:
        DataError: No image has a label of any pixel.
        TrainingError: The folder holds the classifiers of another recipe.
    """
    labelled = PseudoLabelSource(source, folder / LABELS)
    key = label_key(settings.labels, settings.tokens, recipe, _what_the_stage_reads(recipe, settings))
    walk = settings.walk
    begin_labels(folder, f"{key} {settings.least}" + (f" {walk}" if walk else ""))
    missing = [name for name in given.names if not labelled.path(name).is_file()]
    if not missing:
        return labelled
    radius = recipe.augmentation.point_radius

    def known(name: str) -> Labels:
        return _merged({kind: source.load_labels(name, kind) for kind in given.kinds_of(name)}, radius)

    base = {0} if has_background(source.classes) else set[int]()

    # Read once; the maps themselves would not fit into memory.
    classes_of = {name: _classes(known(name)) for name in given.names}
    possible = {name: sorted(base | set(found)) for name, found in classes_of.items()}
    learnt = [name for name, found in classes_of.items() if found]
    if not learnt:
        raise DataError(f"{source.name}: no image has a label of any pixel; label some, or leave method.propagate out")
    torch.manual_seed(recipe.seed)
    encoder = pretrained_encoder(recipe, len(source.classes))
    long_side = settings.long_side or default_long_side(recipe)
    model, recall = fitted_tokens(
        recipe,
        _what_the_stage_reads(recipe, settings),
        source,
        encoder,
        settings.tokens,
        long_side,
        learnt,
        possible.__getitem__,
        known,
        folder / STAGE,
        show,
    )
    if recall < settings.least:
        _log.warning(
            "labels are not carried on: of given labels in images that it had not seen the classifier got %.0f %% "
            "right, expected are %.0f %% (method.propagate.least); %s goes on with the given labels alone",
            100 * recall,
            100 * settings.least,
            recipe.method.name,
        )
        return None
    if show and not math.isnan(recall):
        _log.info("of given labels in images that it had not seen the classifier got %.0f %% right", 100 * recall)
    rule = label_rule(settings.labels)
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    fabric = make_fabric(recipe)
    for done, name in enumerate(missing, start=1):
        own = known(name)
        if "masks" not in given.kinds_of(name) and classes_of[name]:
            image, classes = source.load_image(name), possible[name]
            may = torch.zeros(1, len(source.classes), dtype=torch.bool, device=fabric.device)
            may[0, classes] = True
            with fabric.autocast():
                view = network_image(image, long_side, preprocessing).to(fabric.device)
                labels = torch.from_numpy(own.astype(np.int64))[None].to(fabric.device)
                # Where the background has no label, every walk would arrive at an object.
                how = walk if classes == classes_of[name] else None
                maps = model.probabilities(encoder, view, may, labels, how)[:, 1:].cpu()
            found = pseudo_label(image, maps, [index for index in classes if index], rule, sure_labels)
            own = np.where(own == IGNORE_INDEX, found, own)
        write_label(labelled.path(name), own, source.palette)
        if show and (done % max(1, len(missing) // 5) == 0 or done == len(missing)):
            _log.info("labels carried on: %d of %d images", done, len(missing))
    return labelled


def _classes(labels: Labels) -> list[int]:
    found: list[int] = np.unique(labels[labels != IGNORE_INDEX]).tolist()
    return found


def check_carried(recipe: Recipe, settings: PropagationSettings, folder: Path) -> None:
    """See that classifiers in a run's folder are this recipe's; `training.cam_stage.check_stage`.

    Raises:
        TrainingError: They are another recipe's; the differing keys are named.
    """
    path = folder / STAGE / CHECKPOINT
    if path.is_file():
        load_checkpoint(path, _what_the_stage_reads(recipe, settings))


def _merged(layers: Mapping[str, Labels], radius: int) -> Labels:
    """Masks first, then scribbles, then points as discs; as a training crop has them."""
    merged: Labels | None = None
    for kind, layer in layers.items():
        drawn = grow_points(layer, radius, np.ones(layer.shape, np.bool_)) if kind == "points" else layer
        merged = drawn.copy() if merged is None else np.where(merged == IGNORE_INDEX, drawn, merged)
    assert merged is not None
    return merged


def _what_the_stage_reads(recipe: Recipe, settings: PropagationSettings) -> Recipe:
    """Settings that decide the classifiers; others may change between their end and a restart."""
    tokens = settings.tokens.model_copy(update={"scales": (1.0,), "calibration": None})
    plain: dict[str, Any] = {"tokens": tokens, "long_side": settings.long_side}
    return recipe.model_copy(update={"method": PartialCESettings(propagate=PropagationSettings(**plain))})
