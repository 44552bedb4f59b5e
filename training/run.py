"""A whole run: data set and recipe in, a folder with `model.pt` and its record out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.cam.artifact import save_cams
from training.cam.pseudo_labels import PseudoLabelSource
from training.cam_stage import STAGE, add_pseudo_labels, build_cam_method, check_stage, stage_maps
from training.data.dataset import PIXEL_KINDS, DataSource, has_background
from training.data.pipeline import TrainingSet
from training.data.simulated import SimulatedSource
from training.evaluate import EvaluationResult, evaluate
from training.methods import build_method
from training.methods.base import missing_average
from training.methods.settings import PartialCESettings, SparseSettings
from training.methods.tag_settings import TagsSettings, TSCDSettings
from training.methods.tscd import TSCD
from training.propagation_stage import add_propagated_labels, check_carried
from training.recipe import TAG_METHODS, Recipe, build_recipe, default_recipe, dump_recipe, merge
from training.refinement_choice import RefinementChoice, choose_refinement
from training.state import CHECKPOINT
from training.trainer import Trained, Trainer, device_and_precision
from wsss_deploy import Segmenter
from wsss_deploy.activation import CAMS
from wsss_deploy.artifact import save_model
from wsss_deploy.card import IGNORE_INDEX, ModelCard, Protocol, Sizing
from wsss_deploy.errors import DataError, RecipeError, TrainingError
from wsss_deploy.files import atomic_write
from wsss_deploy.networks import SegmentationNetwork, build_network, encoder_preprocessing

_log = logging.getLogger(__name__)

# See `Recipe.inference_long_side`.
_INFERENCE_SCALE = 1.6

MODEL, RECIPE, RECORD = "model.pt", "recipe.yaml", "run.json"


@dataclass(frozen=True)
class RunResult:
    """What a finished run left.

    Attributes:
        model: Path of `model.pt`.
        trained: Selection, evaluation and time; the evaluation is that of the network without refinement.
        choice: Figures with refinement; None without validation images.
    """

    model: Path
    trained: Trained
    choice: RefinementChoice | None


def resolve_recipe(
    source: DataSource, supervision: str | None, overrides: Sequence[Mapping[str, Any]], resumed: bool = False
) -> Recipe:
    """Defaults for the supervision and the size of the data set, then `overrides` in order.

    Args:
        source: The data set.
        supervision: From the command line; None takes the overrides' value, else "auto". That becomes the one kind of
            label that all training images with labels have, if there is one: each kind has defaults of its own.
        overrides: A recipe file's values, single assignments, command-line options.
        resumed: The first of them is a run's own recipe, whose supervision "auto" stands for.

    Raises:
        RecipeError: Lists every problem.
    """
    given: dict[str, Any] = {}
    for values in overrides:
        given = merge(given, values)
    if supervision is not None:
        given["supervision"] = supervision
    split = str(given.get("train_split", "train"))
    method = given.get("method")
    asked = method.get("name") if isinstance(method, dict) else None
    if given.get("supervision", "auto") == "auto":
        if resumed:
            given["supervision"] = overrides[0].get("supervision", "auto")
        elif (kind := _only_kind(source, split)) and (asked is None or (kind == "tags") == (asked in TAG_METHODS)):
            _log.info("%s: auto means %s here", source.name, kind)
            given["supervision"] = kind
    model = given.get("model")
    pretrained = not isinstance(model, dict) or model.get("weights") != "none"
    images = len(source.splits.get(split, ()))
    base = default_recipe(
        str(given.get("supervision", "auto")), images, pretrained, has_background(source.classes), asked
    )
    if isinstance(given.get("optimisation"), dict) and given["optimisation"].get("ema") == 0:
        base["method"].pop("teacher", None)  # nobody asked for it, and it is the average
    return build_recipe(merge(base, given))


def _only_kind(source: DataSource, split: str) -> str | None:
    """What every training image with labels would contribute to "auto"; None where that differs or is a mixture."""
    used: set[frozenset[str]] = set()
    for name in source.splits.get(split, ()):
        kinds = source.kinds(name)
        used.add(frozenset({"masks"}) if "masks" in kinds else kinds & frozenset(PIXEL_KINDS) or kinds)
    used.discard(frozenset())
    if len(used) > 1:  # images with tags alone are left out where others have labels of pixels
        used.discard(frozenset({"tags"}))
    if len(used) != 1:
        return None
    (kinds,) = used
    return next(iter(kinds)) if len(kinds) == 1 else None


def prepare_source(source: DataSource, recipe: Recipe) -> tuple[DataSource, bool]:
    """The data set with the labels that the recipe asks for, and whether they had to be simulated.

    Labels are simulated only when no training image has the asked kind and masks are there to simulate from; the
    log and the model's protocol say so.

    Raises:
        DataError: The split is missing, or there is nothing to train from.
    """
    names = split_names(source, recipe.train_split)
    kind = recipe.supervision
    if kind in ("auto", "masks") or any(kind in source.kinds(name) for name in names):
        return source, False
    if not any("masks" in source.kinds(name) for name in names):
        raise DataError(
            f"{source.name}: no image of split '{recipe.train_split}' has {kind}, and there are no masks to simulate "
            f"them from; add {'tags.json' if kind == 'tags' else kind + '/'} or choose another --supervision"
        )
    _log.warning(
        "%s has no %s: simulating them from its masks (relative length %g, seed %d)",
        source.name,
        kind,
        recipe.simulation.length,
        recipe.simulation.seed,
    )
    return SimulatedSource(source, kind, recipe.simulation.seed, length=recipe.simulation.length), True


def split_names(source: DataSource, split: str) -> tuple[str, ...]:
    """Image names of a split.

    Raises:
        DataError: There is no such split; the known ones are named.
    """
    if split not in source.splits:
        known = ", ".join(source.splits) or "none"
        raise DataError(f"{source.name}: no split '{split}' (splits: {known}); add splits/{split}.txt")
    return source.splits[split]


def run(recipe: Recipe, source: DataSource, folder: Path, resume: bool = False, show: bool = True) -> RunResult:
    """Train, choose, save.

    Args:
        recipe: The resolved recipe.
        source: The data set.
        folder: Run folder; made when absent.
        resume: Go on from its checkpoint.
        show: Progress on the terminal.

    Raises:
        DataError, TrainingError: See `prepare_source` and `Trainer.run`.
    """
    _check_tags(recipe, source)
    _check_average(recipe)
    _check_classes(recipe, source)
    device_and_precision(recipe)  # before anything is downloaded
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    _check_size(recipe, preprocessing.stride)
    _claim(folder, resume)
    if resume and not any((folder / place / CHECKPOINT).exists() for place in ("", STAGE)):
        if not (folder / RECIPE).is_file():
            raise TrainingError(f"{folder}: no checkpoint to resume from; leave --resume out to start, or check --out")
        _log.info("%s: stopped before its first checkpoint; starting from the beginning", folder)
        resume = False
    labelled, simulated = prepare_source(source, recipe)
    kinds: Any = "auto" if recipe.supervision == "auto" else (recipe.supervision,)
    names = split_names(labelled, recipe.train_split)
    model = recipe.model
    architecture = model.architecture
    long_side = recipe.inference_long_side
    if long_side is None:
        long_side = 32 * round(_INFERENCE_SCALE * recipe.augmentation.size / 32)
    card = ModelCard(
        name=f"{source.name}-{recipe.supervision}",
        classes=source.classes,
        palette=source.palette,
        architecture=architecture,
        preprocessing=preprocessing,
        sizing=Sizing(long_side=long_side or None),
        versions=versions(),
    )
    if isinstance(recipe.method, TagsSettings):
        check_stage(recipe, folder)
        _write_recipe(folder, recipe)
        pseudo = add_pseudo_labels(recipe, labelled, folder, show, card)
        tagged = [name for name in names if "masks" in pseudo.kinds(name)]
        if len(tagged) < len(names):
            _log.warning(
                "%s: %d of %d images have no tags and are left out", source.name, len(names) - len(tagged), len(names)
            )
        labelled, names, kinds = pseudo, tuple(tagged), ("masks",)
        resume = resume and (folder / CHECKPOINT).exists()
    dataset = TrainingSet(labelled, names, kinds, recipe.augmentation, recipe.seed)
    settings = recipe.method
    if isinstance(settings, SparseSettings) and settings.propagate is not None:
        check_carried(recipe, settings.propagate, folder)
        _write_recipe(folder, recipe)
        carried = add_propagated_labels(recipe, settings.propagate, labelled, dataset, folder, show)
        resume = resume and (folder / CHECKPOINT).exists()
        if carried is not None:
            dataset = TrainingSet(carried, dataset.names, ("masks",), recipe.augmentation, recipe.seed)
            settings = PartialCESettings() if settings.propagate.alone else settings
    class_maps = None
    if isinstance(settings, TagsSettings) and settings.correspondence_weight:
        class_maps = stage_maps(recipe, labelled, folder)
    _seed(recipe.seed)
    network = build_network(architecture, len(source.classes), weights=model.weights, drop_path=model.drop_path)
    counts = _class_counts(dataset) if getattr(settings, "class_weights", "off") == "counts" else None
    cams = None
    if isinstance(settings, TSCDSettings):
        cams = build_cam_method(settings, network.encoder, dataset, recipe)
    method = build_method(
        settings, len(source.classes), preprocessing, counts, network.encoder, network.decoder, class_maps, cams
    )
    validation = _validation_names(source, recipe)

    def validate(state: SegmentationNetwork) -> EvaluationResult | None:
        if not validation:
            return None
        device = str(next(state.parameters()).device)
        segmenter = Segmenter.from_network(state, card, device=device)
        return evaluate(segmenter, source, validation, recipe.evaluation.split)

    trainer = Trainer(recipe, network, method, dataset, preprocessing, folder, validate)
    _write_recipe(folder, recipe)  # not earlier: what cannot start leaves nothing that looks like a run
    trained = trainer.run(resume, show)
    if isinstance(method, TSCD):
        depth = getattr(method.settings.cams, "depth", 1.0)
        save_cams(folder / CAMS, card, network.encoder, method.classifier.head, depth)
    protocol = _protocol(recipe, source, dataset, simulated, trained)
    if isinstance(dataset.source, PseudoLabelSource) and isinstance(recipe.method, SparseSettings):
        carried_on = f"carried on before the training, which then was {settings.name}"
        protocol = protocol.model_copy(update={"notes": {**protocol.notes, "labels": carried_on}})
    choice = None
    if validation:
        network.load_state_dict(trained.state)
        device = str(next(network.parameters()).device)
        choice = choose_refinement(network, card, source, validation, device)
        protocol = protocol.model_copy(update={"metrics": {**protocol.metrics, **choice.metrics()}})
    refinement = None if choice is None else choice.refinement
    card = card.model_copy(update={"protocol": protocol, "refinement": refinement})
    save_model(folder / MODEL, card, trained.state)
    _write_record(folder / RECORD, recipe, source, card, trained, choice)
    return RunResult(folder / MODEL, trained, choice)


def _check_tags(recipe: Recipe, source: DataSource) -> None:
    """Methods that learn from tags need tags, and tags need one of them and a background.

    Raises:
        RecipeError: Method and supervision do not fit.
        DataError: Class 0 is not the background.
    """
    from_tags = isinstance(recipe.method, TagsSettings | TSCDSettings)
    if from_tags != (recipe.supervision == "tags"):
        fitting = "masks, scribbles, points or auto" if not from_tags else "tags"
        raise RecipeError(
            [
                f"method.name: '{recipe.method.name}' learns from {fitting}, supervision is {recipe.supervision}; "
                "with --supervision tags use tags, tscd or sfc, else another method"
            ]
        )
    propagate = recipe.method.propagate if isinstance(recipe.method, SparseSettings) else None
    if propagate is not None and propagate.tokens.images and not has_background(source.classes):
        raise RecipeError(
            [
                f"method.propagate.tokens.images: needs a class 'background' first, class 0 is '{source.classes[0]}'; "
                "set it to false"
            ]
        )
    if from_tags and not has_background(source.classes):
        raise DataError(
            f"{source.name}: class 0 is '{source.classes[0]}'; training from image tags needs a class 'background' "
            "first, the place for pixels that belong to no tag"
        )


def _check_average(recipe: Recipe) -> None:
    """Methods with a teacher need the moving average that it is.

    Raises:
        RecipeError: It is off.
    """
    for option in ("teacher", "correction"):
        if recipe.optimisation.ema == 0 and getattr(recipe.method, option, None) is not None:
            raise missing_average(f"method.{option}")


def _check_classes(recipe: Recipe, source: DataSource) -> None:
    """A class matrix has the data set's classes.

    Raises:
        RecipeError: It has others.
    """
    matrix = getattr(recipe.method, "compatibility", None)
    if matrix is not None and len(matrix) != len(source.classes):
        raise RecipeError(
            [f"method.compatibility: has {len(matrix)} rows, expected one for each of {len(source.classes)} classes"]
        )


def _check_size(recipe: Recipe, stride: int) -> None:
    """Crops must fit the encoder's grid, and a map on which a loss acts the crops.

    Raises:
        RecipeError: They do not; the nearest values that do are named.
    """
    size = recipe.augmentation.size
    if size % stride:
        below, above = size // stride * stride, (size // stride + 1) * stride
        near = f"{below} or {above}" if below else f"{above}"
        raise RecipeError(
            [f"augmentation.size: {size} is no multiple of {stride}, which '{recipe.model.encoder}' needs; use {near}"]
        )
    coarser = getattr(recipe.method, "stride", 1)
    # A map of a single pixel has no pairs.
    fitting = [number for number in range(1, size // 2 + 1) if size % number == 0]
    if coarser not in fitting:
        fault = (
            f"leaves a single pixel of a crop of {size}" if coarser == size else f"does not divide the crop's {size}"
        )
        # The next below and the next above, where there is one.
        nearest = fitting[bisect(fitting, coarser) - 1 :][:2]
        use = " or ".join(str(number) for number in nearest)
        raise RecipeError([f"method.stride: {coarser} {fault} pixels (augmentation.size); use {use}"])


def _claim(folder: Path, resume: bool) -> None:
    if (folder / MODEL).exists():
        what = "is finished already, there is nothing to resume" if resume else "holds a finished run"
        raise TrainingError(f"{folder}: {what} ({MODEL}); for another run choose another --out")
    if any((folder / place / CHECKPOINT).exists() for place in ("", STAGE)) and not resume:
        raise TrainingError(f"{folder}: holds an unfinished run; go on with --resume, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    if (folder / CHECKPOINT).exists():
        return  # the training's own stays; the trainer sees whether it is this one
    with atomic_write(folder / RECIPE) as file:
        file.write(dump_recipe(recipe).encode())


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def _class_counts(dataset: TrainingSet) -> list[int]:
    """Labelled pixels per class over the training images, of the kinds that are trained from."""
    counts = np.zeros(256, dtype=np.int64)
    for name in dataset.names:
        for kind in dataset.kinds_of(name):
            counts += np.bincount(dataset.source.load_labels(name, kind).ravel(), minlength=256)
    return [int(count) for count in counts[: len(dataset.source.classes)]]


def _validation_names(source: DataSource, recipe: Recipe) -> tuple[str, ...]:
    names = source.splits.get(recipe.evaluation.split, ())
    return tuple(name for name in names if "masks" in source.kinds(name))


def _protocol(recipe: Recipe, source: DataSource, dataset: TrainingSet, simulated: bool, trained: Trained) -> Protocol:
    metrics = {}
    if trained.result is not None:
        metrics = {
            "val_miou": trained.result.miou,
            "val_boundary_miou": trained.result.mean_boundary_iou,
            "val_foreground_miou": trained.result.foreground_miou,
        }
    weights = recipe.model.weights
    notes = {"simulation": f"length {recipe.simulation.length}, seed {recipe.simulation.seed}"} if simulated else {}
    return Protocol(
        supervision=(recipe.supervision,),
        simulated=simulated,
        method=recipe.method.name,
        data=source.name,
        train_images=len(dataset),
        iterations=recipe.optimisation.iterations,
        batch_size=recipe.optimisation.batch_size,
        size=recipe.augmentation.size,
        seed=recipe.seed,
        weights=weights if weights in ("timm", "none") else Path(weights).name,
        selection=trained.selection,
        metrics=metrics,
        notes=notes,
    )


def versions() -> dict[str, str]:
    """Versions that a reader of a result needs."""
    names = ("wsss-deploy", "torch", "timm", "torchvision", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version()}


def _write_record(
    path: Path, recipe: Recipe, source: DataSource, card: ModelCard, trained: Trained, choice: RefinementChoice | None
) -> None:
    names = split_names(source, recipe.train_split)
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "protocol": None if card.protocol is None else card.protocol.model_dump(mode="json"),
        "versions": card.versions,
        "data_digest": hashlib.sha256("\n".join([*source.classes, *sorted(names)]).encode()).hexdigest(),
        "ignore_index": IGNORE_INDEX,
        "chosen_iteration": trained.iteration,
        "training_seconds": round(trained.seconds, 1),
        "threads": torch.get_num_threads(),
        "command": Path(sys.argv[0]).name,
        "evaluation": None if trained.result is None else trained.result.to_plain(),
        "refinement": None if choice is None else choice.to_plain(),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1).encode())
