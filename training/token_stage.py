"""Linear classifiers on the tokens of a frozen encoder as a stage of a run, fitted once and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.cam.objectness import Objectness
from training.cam.pseudo_labels import network_image
from training.cam.random_walk import label_parts
from training.cam.tokens import TokenCams, Tokens, collect_tokens, fit_tokens, images_per_class, recall_of
from training.data.dataset import DataSource
from training.methods.tag_settings import TokenSettings
from training.recipe import Recipe
from training.state import CHECKPOINT, load_checkpoint, save_checkpoint
from training.trainer import make_fabric, use_plain_attention
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.networks import build_network, encoder_preprocessing
from wsss_deploy.networks.encoder import Encoder

_log = logging.getLogger(__name__)

# Beyond the largest crop of the training, objects outgrow what tokens expect.
_LONG_SIDE = 1.5
# Pixels up to which multiplying matrices takes less time than torch's fused attention, and little memory.
_PLAIN_ATTENTION_SIDE = 640

_FEW = (
    "%.0f images a class (median) are few to learn from tags alone where a class is: %s; look at OUT/pseudo_labels, "
    "and prefer points or more images"
)
_HELPED = "what looks like an object is taken into account (method.cams.objectness)"
_ALONE = "background may be taken for it"

Labels = NDArray[np.uint8]


def default_long_side(recipe: Recipe) -> int:
    """Pixels of the longer side at which whole images are read, where the recipe does not say."""
    return round(_LONG_SIDE * recipe.augmentation.size)


def pretrained_encoder(recipe: Recipe, classes: int) -> Encoder:
    """The recipe's encoder with the weights that it starts from, in evaluation mode and on the recipe's device."""
    model = recipe.model
    network = build_network(model.architecture, classes, weights=model.weights, drop_path=model.drop_path)
    return network.to(make_fabric(recipe).device).eval().encoder


def fitted_tokens(
    recipe: Recipe,
    stage_recipe: Recipe,
    source: DataSource,
    encoder: Encoder,
    settings: TokenSettings,
    long_side: int,
    names: Sequence[str],
    possible: Callable[[str], Sequence[int]],
    known: Callable[[str], Labels] | None,
    stage: Path,
    show: bool = True,
) -> tuple[TokenCams, float]:
    """Classifiers of a data set, in evaluation mode; from the stage's checkpoint if there is one.

    Args:
        recipe: Of the run.
        stage_recipe: What decides the classifiers, for the checkpoint.
        source: The data set.
        encoder: See `pretrained_encoder`.
        settings: Of the classifiers.
        long_side: Pixels of the longer side at which images are read.
        names: Images to learn from.
        possible: Class ids that an image may hold, with the background.
        known: Labels uint8 (H, W) of an image, 255 = none. None learns from the classes of images alone.
        stage: Folder of the checkpoint.
        show: Whether the log says how far it is.

    Returns:
        The classifiers, and the recall of known labels of images (a fifth) by others that have not seen them
        (`recall_of`); NaN where nothing is known or there is one image.

    Raises:
        TrainingError: The checkpoint is of another recipe, or features do not fit onto the disk.
    """
    path, classes = stage / CHECKPOINT, len(source.classes)
    fabric = make_fabric(recipe)
    if fabric.device.type == "cpu" and max(settings.scales) * long_side <= _PLAIN_ATTENTION_SIDE:
        use_plain_attention(encoder)
    if path.is_file():
        return kept_tokens(path, stage_recipe, encoder, settings, classes, fabric.device)
    model = TokenCams(settings, encoder, classes)
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)

    def views() -> Iterator[Tensor]:
        for done, name in enumerate(names, start=1):
            yield network_image(source.load_image(name), long_side, preprocessing)
            if show and (done % max(1, len(names) // 5) == 0 or done == len(names)):
                _log.info("features: %d of %d images", done, len(names))

    may = torch.zeros(len(names), classes, dtype=torch.bool)
    for row, name in zip(may, names, strict=True):
        row[list(possible(name))] = True
    stage.mkdir(parents=True, exist_ok=True)
    # One name, which a restart after a kill writes over; read, it needs none any more.
    file = stage / "tokens.partial"
    few = known is None and images_per_class(may) < settings.few_images
    objectness = None
    if few and settings.objectness == "auto" and settings.rounds and Objectness.is_known(encoder):
        objectness = Objectness(encoder)
    if few:
        _log.warning(_FEW, images_per_class(may), _ALONE if objectness is None else _HELPED)
    try:
        with fabric.autocast(), objectness or nullcontext():
            tokens = collect_tokens(file, encoder, model.head.indices[0], views(), len(names), objectness)
    finally:
        file.unlink(missing_ok=True)
    labels = None if known is None else _on_grids(tokens, names, known, classes)
    recall = float("nan")
    if labels is not None and len(names) > 1:
        recall = _held_out_recall(TokenCams(settings, encoder, classes), tokens, may, labels, recipe.seed)
    if show:
        _log.info("classifiers: learning from %d positions of %d images", tokens.starts[-1], len(names))
    fit_tokens(model, tokens, may, recipe.seed, labels, None if objectness is None else objectness.maps)
    save_checkpoint(path, stage_recipe, {"classifier": model.state_dict(), "recall": recall})
    return model.to(fabric.device).eval(), recall


def kept_tokens(
    path: Path, stage_recipe: Recipe, encoder: Encoder, settings: TokenSettings, classes: int, device: torch.device
) -> tuple[TokenCams, float]:
    """What `fitted_tokens` kept.

    Args:
        path: The stage's checkpoint.
        stage_recipe: As in `fitted_tokens`.
        encoder: As in `fitted_tokens`.
        settings: As in `fitted_tokens`.
        classes: Number of classes, with background.
        device: Where the classifiers are put.

    Raises:
        TrainingError: The checkpoint is absent, or of another recipe.
    """
    saved = load_checkpoint(path, stage_recipe)
    model = TokenCams(settings, encoder, classes)
    model.load_state_dict(saved["classifier"])
    return model.to(device).eval(), float(saved["recall"])


def _held_out_recall(model: TokenCams, tokens: Tokens, may: Tensor, labels: Labels, seed: int) -> float:
    """Of every fifth image (every second of fewer than five), by classifiers that know their classes at most."""
    held = np.arange(len(tokens)) % min(5, len(tokens)) == 0
    hidden = np.repeat(held, np.diff(tokens.starts))
    fit_tokens(model, tokens, may, seed, np.where(hidden, IGNORE_INDEX, labels))
    return recall_of(model, tokens, may, np.where(hidden, labels, IGNORE_INDEX))


def _on_grids(tokens: Tokens, names: Sequence[str], known: Callable[[str], Labels], classes: int) -> Labels:
    parts = [grid_labels(known(name), size, classes) for name, size in zip(names, tokens.sizes, strict=True)]
    return np.concatenate([part.ravel() for part in parts])


def grid_labels(labels: Labels, size: tuple[int, int], classes: int) -> Labels:
    """The commonest label of each cell of a coarser grid.

    Args:
        labels: uint8 (H, W), 255 = none.
        size: Rows and columns of the grid.
        classes: Number of classes.

    Returns:
        uint8 `size`, 255 where a cell has no label.
    """
    counts = label_parts(torch.from_numpy(labels.astype(np.int64))[None], size, classes)[0].numpy()
    return np.where(counts.any(axis=0), counts.argmax(axis=0), IGNORE_INDEX).astype(np.uint8)
