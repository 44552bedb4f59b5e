"""First stage of `tags` and `sfc`: a classifier's CAMs become pseudo-labels of the training images, on disk.

Restartable at any point: the classifier's training has a checkpoint of its own, and images whose label file is
there are not read again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.cam.artifact import save_cams
from training.cam.head import freeze
from training.cam.labels import presence, refined_labels, sure_labels
from training.cam.pseudo_labels import PseudoLabelSource, network_image, pseudo_label, write_label
from training.cam.tokens import TokenCams
from training.data.dataset import DataSource
from training.data.pipeline import TrainingSet
from training.methods.cam_methods import CamModel, ClassifierCams, SharedFeatureCams
from training.methods.label_rule import label_rule
from training.methods.tag_settings import (
    CamKind,
    CamSettings,
    LabelSettings,
    SharedFeatureSettings,
    TagsSettings,
    TokenSettings,
    TSCDSettings,
)
from training.recipe import EvaluationSettings, Recipe
from training.state import CHECKPOINT, load_checkpoint, recipe_digest
from training.token_stage import default_long_side, fitted_tokens, kept_tokens, pretrained_encoder
from training.trainer import Trainer, make_fabric
from wsss_deploy.activation import CAMS
from wsss_deploy.card import ModelCard
from wsss_deploy.errors import RecipeError, TrainingError
from wsss_deploy.files import atomic_write
from wsss_deploy.networks import build_network, encoder_preprocessing
from wsss_deploy.networks.encoder import Encoder

_log = logging.getLogger(__name__)

LearningStage = ClassifierCams | SharedFeatureCams
Stage = LearningStage | TokenCams

STAGE, LABELS = "cams", "pseudo_labels"


def add_pseudo_labels(
    recipe: Recipe,
    source: DataSource,
    folder: Path,
    show: bool = True,
    card: ModelCard | None = None,
    names: Sequence[str] | None = None,
) -> PseudoLabelSource:
    """The data set with pseudo-labels as masks of its tagged training images.

    An image whose tags are known and empty becomes all background; an image without tags gets no label.

    Args:
        recipe: Of the whole run; its method is `tags` or `sfc`.
        source: With tags.
        folder: Run folder; `cams/` and `pseudo_labels/` are made in it.
        show: Progress on the terminal.
        card: Of the model to be; with it, the classifier's maps are saved beside it (`training.cam.artifact`).
        names: Images that get labels if they are tagged; None is the training split.

    Raises:
        RecipeError: The recipe's method has no such stage.
        TrainingError: See `Trainer.run`.
    """
    settings = _settings(recipe)
    labelled = PseudoLabelSource(source, folder / LABELS)
    begin_labels(folder, label_key(settings.labels, settings.cams, recipe, _stage_recipe(recipe)))
    wanted = source.splits[recipe.train_split] if names is None else names
    tagged = [name for name in wanted if source.tags(name) is not None]
    missing = [name for name in tagged if not labelled.path(name).is_file()]
    if not missing:
        return labelled
    encoder, method = trained_classifier(recipe, source, folder, show)
    if card is not None:
        depth = 1.0 if isinstance(settings.cams, SharedFeatureSettings) else settings.cams.depth
        save_cams(folder / CAMS, card, encoder, method.head, depth)
    rule = label_rule(settings.labels)
    make = sure_labels if method.knows_background else refined_labels
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    autocast = make_fabric(recipe).autocast
    for done, name in enumerate(missing, start=1):
        image, tags = source.load_image(name), source.tags(name) or ()
        with autocast():
            view = network_image(image, long_side_of(recipe), preprocessing)
            cams = whole_image_cams(encoder, method, view, tags)
        write_label(labelled.path(name), pseudo_label(image, cams.cpu(), tags, rule, make), source.palette)
        if show and (done % max(1, len(missing) // 5) == 0 or done == len(missing)):
            _log.info("pseudo-labels: %d of %d images", done, len(missing))
    return labelled


def check_stage(recipe: Recipe, folder: Path) -> None:
    """See that a classifier that was begun is this recipe's.

    Complete labels are not made again, and then `add_pseudo_labels` does not look at the classifier: to be called
    before it where a run goes on.

    Args:
        recipe: As in `add_pseudo_labels`.
        folder: The run's.

    Raises:
        TrainingError: It is another recipe's; the differing keys are named.
    """
    path = folder / STAGE / CHECKPOINT
    if path.is_file():
        load_checkpoint(path, _stage_recipe(recipe))


def begin_labels(folder: Path, key: str) -> None:
    """Make the folder of pseudo-labels; those that were made by another rule are removed, so that none are mixed.

    Once the training on them has begun they stay: its checkpoint knows whether it may go on.

    Args:
        folder: The run's.
        key: All that decides them (`label_key`).
    """
    labels = folder / LABELS
    rule = labels / "rule.json"
    if (folder / CHECKPOINT).is_file() and labels.is_dir():
        return
    if not rule.is_file() or rule.read_text() != key:
        for path in labels.glob("*.png"):
            path.unlink()
        labels.mkdir(parents=True, exist_ok=True)
        with atomic_write(rule) as file:
            file.write(key.encode())


def label_key(labels: LabelSettings, cams: CamKind, recipe: Recipe, stage: Recipe) -> str:
    """All that decides pseudo-labels, as text; what decides the classifier (`stage`) by its digest.

    A classifier that was deleted leaves no checkpoint that could tell.
    """
    values: dict[str, object] = {"labels": labels.model_dump(mode="json"), "scales": list(cams.scales)}
    values["classifier"] = recipe_digest(stage)
    if isinstance(cams, TokenSettings):
        values |= cams.model_dump(mode="json", include={"calibration"})
    if isinstance(recipe.method, TagsSettings):
        values["long_side"] = long_side_of(recipe)
        values["fusion"] = getattr(recipe.method.cams, "fusion", None)
        values["depth"] = getattr(recipe.method.cams, "depth", None)
    return json.dumps(values)


def trained_classifier(recipe: Recipe, source: DataSource, folder: Path, show: bool = True) -> tuple[Encoder, Stage]:
    """Encoder and method after the first stage, in evaluation mode; trained here or read from its checkpoint.

    Args and errors as in `add_pseudo_labels`.
    """
    settings, model = _settings(recipe), recipe.model
    stage = folder / STAGE
    stage.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    if isinstance(settings.cams, TokenSettings):
        encoder = pretrained_encoder(recipe, len(source.classes))
        names = [name for name in source.splits[recipe.train_split] if source.tags(name) is not None]
        fitted, _ = fitted_tokens(
            recipe,
            _stage_recipe(recipe),
            source,
            encoder,
            settings.cams,
            long_side_of(recipe),
            names,
            lambda name: (0, *(source.tags(name) or ())),
            None,
            stage,
            show,
        )
        return encoder, fitted
    architecture = model.architecture
    network = build_network(architecture, len(source.classes), weights=model.weights, drop_path=model.drop_path)
    dataset = TrainingSet(source, source.splits[recipe.train_split], ("tags",), recipe.augmentation, recipe.seed)
    freeze(network.encoder, settings.cam_frozen)
    method = build_cam_method(settings, network.encoder, dataset, recipe)
    stage_recipe = _stage_recipe(recipe)
    preprocessing = encoder_preprocessing(model.encoder, model.encoder_options)
    trainer = Trainer(stage_recipe, network, method, dataset, preprocessing, stage, lambda _: None)
    trainer.run((stage / CHECKPOINT).is_file(), show)
    return network.eval().encoder, method.eval()


def finished_classifier(
    recipe: Recipe, folder: Path, classes: int, device: str | None = None
) -> tuple[Encoder, CamModel]:
    """Encoder and classifier of a run as its training left them, in evaluation mode; nothing is trained or written.

    Args:
        recipe: Of the run: `tags` or `sfc`, whose first stage's they are, or `tscd`.
        folder: The run's.
        classes: Number of classes, with background.
        device: In place of the recipe's.

    Raises:
        RecipeError: The run's method is another one.
        TrainingError: Their training has no checkpoint of this recipe, or has not ended.
    """
    here = recipe if device is None else recipe.model_copy(update={"device": device})
    place = make_fabric(here).device
    if isinstance(recipe.method, TSCDSettings):
        path, stage = folder / CHECKPOINT, recipe
    else:
        path, stage = folder / STAGE / CHECKPOINT, _stage_recipe(recipe)
    method: CamModel
    if isinstance(recipe.method, TagsSettings) and isinstance(recipe.method.cams, TokenSettings):
        encoder = pretrained_encoder(here, classes)
        method, _ = kept_tokens(path, stage, encoder, recipe.method.cams, classes, place)
        return encoder, method
    saved = load_checkpoint(path, stage)
    if saved["iteration"] < stage.optimisation.iterations:
        raise TrainingError(
            f"{path}: is at iteration {saved['iteration']} of {stage.optimisation.iterations}; finish the run with "
            "--resume first"
        )
    network = build_network(recipe.model.architecture, classes, weights="none", drop_path=recipe.model.drop_path)
    parts: list[tuple[torch.nn.Module, str]] = [(network, "network.")]
    cams = recipe.method.cams if isinstance(recipe.method, TSCDSettings) else _settings(recipe).cams
    # What counts of images decide acts in training alone.
    even = (1,) * (classes - 1)
    method = _cam_method(cams, network.encoder, classes, recipe.augmentation.size, even, 1.0)
    parts.append((method, "method.classifier." if isinstance(recipe.method, TSCDSettings) else "method."))
    for module, prefix in parts:
        state = saved["module"]
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return network.to(place).eval().encoder, method.to(place).eval()


def stage_maps(recipe: Recipe, source: DataSource, folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """What the first stage's classifier says of images and tags (N, C), for the second; see `CamModel.class_maps`.

    Args and errors as in `add_pseudo_labels`.
    """
    encoder, method = trained_classifier(recipe, source, folder, False)

    def maps(image: Tensor, tags: Tensor) -> Tensor:
        return method.class_maps(encoder, image, tags[:, 1:])

    return maps


def _stage_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the first stage alone."""
    settings = _settings(recipe)
    changes: dict[str, object] = {"method": _what_the_stage_reads(settings)}
    if not isinstance(settings.cams, TokenSettings):
        changes["evaluation"] = EvaluationSettings(every=settings.cam_iterations)
        changes["optimisation"] = recipe.optimisation.model_copy(
            update={
                "iterations": settings.cam_iterations,
                "learning_rate": settings.cam_learning_rate,
                "decoder_factor": settings.cam_head_factor,
                # The classifiers are the method's, of which no average is kept.
                "ema": 0.0,
            }
        )
    return recipe.model_copy(update=changes)


def long_side_of(recipe: Recipe) -> int:
    """Pixels of the longer side at which images are read for their CAMs."""
    given = recipe.method.cam_long_side if isinstance(recipe.method, TagsSettings) else None
    return given or default_long_side(recipe)


def _settings(recipe: Recipe) -> TagsSettings:
    if not isinstance(recipe.method, TagsSettings):
        raise RecipeError([f"method.name: '{recipe.method.name}' has no stage that makes pseudo-labels"])
    return recipe.method


def _what_the_stage_reads(settings: TagsSettings) -> TagsSettings:
    """Settings that decide the classifier's training; others may change between its end and a restart.

    So labels can be made anew (delete `pseudo_labels/`, --resume with other thresholds) without training again.
    """
    cams = settings.cams
    if isinstance(cams, TokenSettings):
        cams = cams.model_copy(update={"scales": (1.0,), "calibration": None})
        return type(settings)(cams=cams, cam_long_side=settings.cam_long_side)
    if isinstance(cams, CamSettings):
        # Which of the depths gives the CAM may change; it has to be one of them.
        cams = CamSettings(depths=cams.depths, depth=cams.depths[-1], pooling=cams.pooling)
    else:
        cams = cams.model_copy(update={"fusion": 0.7, "scales": (1.0,)})
    return type(settings)(
        cams=cams,
        cam_iterations=settings.cam_iterations,
        cam_learning_rate=settings.cam_learning_rate,
        cam_head_factor=settings.cam_head_factor,
        cam_frozen=settings.cam_frozen,
    )


def build_cam_method(
    settings: TagsSettings | TSCDSettings, encoder: Encoder, dataset: TrainingSet, recipe: Recipe
) -> LearningStage:
    """What gives CAMs while the encoder learns: the first stage's method, or the classifier within a single stage.

    Args:
        settings: From the recipe.
        encoder: Tells channels.
        dataset: Tagged training images.
        recipe: Tells crop and batch size.
    """
    per_epoch = max(1.0, len(dataset) / recipe.optimisation.batch_size)
    counts = tag_counts(dataset.source, dataset.names)
    classes = len(dataset.source.classes)
    return _cam_method(settings.cams, encoder, classes, recipe.augmentation.size, counts, per_epoch)


def _cam_method(
    cams: CamSettings | SharedFeatureSettings | TokenSettings,
    encoder: Encoder,
    classes: int,
    size: int,
    counts: tuple[int, ...],
    per_epoch: float,
) -> LearningStage:
    if isinstance(cams, CamSettings):
        return ClassifierCams(cams, encoder, classes)
    assert isinstance(cams, SharedFeatureSettings), "tokens are fitted, not trained"
    return SharedFeatureCams(cams, encoder, classes, size, counts, per_epoch)


def tag_counts(source: DataSource, names: Sequence[str]) -> tuple[int, ...]:
    """Images per foreground class (class id 1 first)."""
    counts = np.zeros(len(source.classes), dtype=np.int64)
    for name in names:
        counts[list(source.tags(name) or ())] += 1
    return tuple(counts[1:].tolist())


@torch.no_grad()
def whole_image_cams(encoder: Encoder, method: CamModel, image: Tensor, tags: Sequence[int]) -> Tensor:
    """CAMs of one image.

    Args:
        encoder: In evaluation mode.
        method: Trained.
        image: Normalised (1, 3, H, W).
        tags: Class ids that are in the image.

    Returns:
        float32 (1, K, H, W) in [0, 1].
    """
    parameter = next(method.parameters())
    present = presence(tags, method.classes).to(parameter.device)
    return method.cams(encoder, image.to(parameter.device), present).float()
