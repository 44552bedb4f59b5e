"""The recipe: the typed, strict configuration of a training run.

A recipe is a YAML file over the classes below. Unknown keys are errors that name the nearest key, and all problems
of a file are reported at once. `default_recipe` picks what works best for a kind of label and a size of data set;
a file and the command line then override single values. The resolved recipe is written beside each run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.data.pipeline import Augmentation
from training.methods.settings import MethodSettings
from wsss_deploy.card import Architecture
from wsss_deploy.errors import RecipeError

Supervision = Literal["masks", "scribbles", "points", "tags", "auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Strict):
    """The network.

    Attributes:
        encoder: timm model name.
        encoder_options: Further keyword arguments of the timm model.
        decoder: Decoder name.
        decoder_width: Channels inside the decoder.
        drop_path: Stochastic depth rate of the encoder.
        weights: The encoder's start: "timm" (downloads), "none", or the path of a safetensors/pt file.
    """

    encoder: str = "vit_tiny_patch16_224"
    encoder_options: dict[str, Any] = Field(default_factory=dict)
    decoder: str = "mlp"
    decoder_width: Annotated[int, Field(ge=8, le=4096)] = 256
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weights: str = "timm"

    @property
    def architecture(self) -> Architecture:
        """What a model's card says of the network."""
        return Architecture(
            encoder=self.encoder,
            decoder=self.decoder,
            decoder_width=self.decoder_width,
            encoder_options=self.encoder_options,
        )


class Optimisation(_Strict):
    """Optimiser, linear warm-up and polynomial decay.

    Attributes:
        optimiser: "adamw" (betas 0.9 and 0.999) or "sgd".
        momentum: Of "sgd"; SFC's released code has 1e-4, where it meant a weight decay.
        iterations: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak rate of the encoder.
        decoder_factor: The decoder's and heads' rate in units of the encoder's.
        layer_decay: Factor of the rate from each layer of the encoder to the one below it (ELECTRA, arXiv 2003.10555;
            BEiT, arXiv 2106.08254): its last layer trains at `learning_rate * layer_decay`, the first of L at
            `learning_rate * layer_decay ** L`, so that what it was pretrained for is kept. 1 is one rate for all.
        weight_decay: Decoupled decay; biases, norms and position tables are exempt.
        warmup: Fraction of the iterations over which the rate rises linearly.
        power: Exponent of the polynomial decay.
        schedule: "product" multiplies warm-up and decay; "switch" rises to the peak and then jumps to where the decay
            would be by then, as the released code of AFA and TSCD does.
        warmup_start: The warm-up's first factor under "switch".
        clip: Largest gradient norm; 0 turns clipping off.
        ema: Decay of the exponential moving average of the weights that is evaluated and saved; 0 turns it off.
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    iterations: Annotated[int, Field(ge=1)] = 500
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    decoder_factor: Annotated[float, Field(gt=0)] = 10.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Fraction = 0.1
    power: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["product", "switch"] = "product"
    warmup_start: Fraction = 1e-6
    clip: Annotated[float, Field(ge=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99

    @model_validator(mode="after")
    def _momentum_acts(self) -> Self:
        if self.optimiser == "adamw" and self.momentum != 0.9:
            raise ValueError("momentum is sgd's; set optimiser: sgd, or leave it out")
        return self


class EvaluationSettings(_Strict):
    """Validation during training.

    Attributes:
        split: Name of the split that is evaluated; without masks for it nothing is, and the last state is kept.
        every: Iterations between evaluations; the end of the run is always evaluated.
    """

    split: str = "val"
    every: Annotated[int, Field(ge=1)] = 250


class Simulation(_Strict):
    """Weak labels that are simulated from masks where the data set has none of the asked kind.

    Attributes:
        length: Relative length of scribbles, 0 to 1.
        seed: Seed of the simulation; independent of the training seed, so that seeds of a comparison share labels.
    """

    length: Fraction = 1.0
    seed: int = 0


class Recipe(_Strict):
    """A training run.

    Attributes:
        supervision: Kind of label to train from, or "auto": each image contributes the densest it has.
        method: How the losses combine; see `training.methods.settings`.
        model: The network.
        augmentation: Crops and photometric changes.
        optimisation: Optimiser, schedule, length.
        evaluation: Validation during training.
        simulation: Used only where labels have to be simulated.
        train_split: Name of the split to train on.
        inference_long_side: Longer side, in pixels, at which the trained model is meant to run; 0 runs at each
            image's own size. None takes 1.6 times `augmentation.size`, to a multiple of 32: somewhat more pixels than
            in training cost nothing there and sharpen every border (docs/results.md).
        seed: Seed of everything random.
        precision: "auto" is bf16 on a GPU or CPU that computes it natively and fp32 elsewhere; losses and norms
            run in fp32 either way.
        device: "auto", "cpu" or "cuda".
        workers: Processes that load data; 0 loads in the training process, None is 0 on a CPU and up to 8 on a GPU.
        deterministic: Ask torch for deterministic algorithms (slower on a GPU; a CPU run repeats exactly anyway).
        checkpoint_every: Seconds between checkpoints of the training state.
    """

    supervision: Supervision = "auto"
    method: MethodSettings
    model: ModelSettings = ModelSettings()
    augmentation: Augmentation = Augmentation()
    optimisation: Optimisation = Optimisation()
    evaluation: EvaluationSettings = EvaluationSettings()
    simulation: Simulation = Simulation()
    train_split: str = "train"
    inference_long_side: Annotated[int, Field(ge=0, le=16384)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0, le=64)] | None = None
    deterministic: bool = False
    checkpoint_every: Annotated[float, Field(gt=0)] = 60.0


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which the values of `over` replace or, for mappings, extend those of `base`.

    A mapping with another `name` (another method) or `kind` replaces instead of extending: options of one mean
    nothing to the next. Options that came before any name are of the one that is named then.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _is_another(old, value):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def _is_another(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(None not in (old.get(key), new.get(key)) and old[key] != new[key] for key in ("name", "kind"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values: `off`, `on`, `yes` and `no` are texts, which here are names of choices."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's way to change them
        first: [item for item in items if not (item[0].endswith(":bool") and first not in "tTfF")]
        for first, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a YAML recipe file, not yet validated.

    Raises:
        RecipeError: The file cannot be read or is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror}); give the path of a YAML recipe"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError([f"{path}: holds a {type(values).__name__}, expected keys and values"])
    return values


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Nested values from `key.sub=value` texts; values are YAML.

    Raises:
        RecipeError: A text has no "=" or an empty key.
    """
    result: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        parts = key.split(".")
        if not separator or not all(parts):
            raise RecipeError([f"'{text}': expected KEY=VALUE, for example optimisation.learning_rate=1e-4"])
        try:
            nested: Any = _number(yaml.load(value, _Loader))
        except yaml.YAMLError as error:
            raise RecipeError([f"'{text}': the value is not valid YAML"]) from error
        for part in reversed(parts):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def _number(value: object) -> object:
    # YAML 1.1 reads 1e-4 (no dot) as text; nobody who types it means text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate values.

    Args:
        values: Nested mappings, as `read_recipe` and `parse_assignments` give them.
        source: Named in errors.

    Raises:
        RecipeError: Lists every problem; an unknown key names the nearest known one.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError([f"{source}: {_problem(item)}" for item in error.errors()]) from error


TAG_METHODS = ("tags", "sfc", "tscd")
_CAM_KINDS = ("tokens", "classifier", "shared_feature")


def _problem(item: Any) -> str:
    # The tag of the method's union is part of pydantic's location but not of the file.
    path = [str(part) for part in item["loc"]]
    if len(path) > 1 and path[0] == "method":
        del path[1]
    kind = "name"
    if path[:2] == ["method", "cams"]:
        kind = "kind"
        if len(path) > 2 and path[2] in _CAM_KINDS:
            del path[2]
    where = ".".join(path)
    if item["type"] == "missing":
        return f"{where}: missing"
    if item["type"] == "union_tag_invalid":
        known = re.findall(r"'(\w+)'", item["ctx"]["expected_tags"])
        return f"{where}.{kind}: no {'method' if kind == 'name' else kind} '{item['ctx']['tag']}'; " + _nearest(
            item["ctx"]["tag"], known
        )
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):
        return f"{where}: {item['msg'].removeprefix('Value error, ')}"  # of several values, which it names
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']} (found {item['input']!r})"
    inside = list(item["input"]) if isinstance(item["input"], Mapping) else []
    # A method's option may be another method's: the place where it stands is no answer.
    if places := [place for place in _places([path[-1], *map(str, inside)]) if place != where]:
        return f"{where}: unknown key; did you mean {' or '.join(map(repr, places))}?"
    known = _known_keys(item["loc"][:-1])
    return f"{where}: unknown key; {_nearest(path[-1], known)}"


def _places(names: Sequence[str]) -> list[str]:
    """Where the recipe has values of these very names: right names in a wrong section are a common mistake."""
    sections = [""] + [name for name, field in Recipe.model_fields.items() if _models(field.annotation)]
    # Every method has a name and every other choice a kind: these two tell nothing.
    wanted = [name for name in names if name not in ("name", "kind")]
    return [
        f"{section}.{name}".removeprefix(".")
        for name in wanted
        for section in sections
        if name in _known_keys([section] if section else [])
    ]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Field names of the recipe at `path`, a pydantic error location: keys, list positions and union tags."""
    options: list[type[BaseModel]] = [Recipe]
    for part in path:
        if isinstance(part, int):
            continue
        tagged = [
            model
            for model in options
            if part in (getattr(model.model_fields.get(field), "default", None) for field in ("name", "kind"))
        ]
        fields = [model.model_fields[part] for model in options if part in model.model_fields]
        options = tagged or [model for found in fields for model in _models(found.annotation)]
    return sorted({key for model in options for key in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def default_recipe(
    supervision: str, train_images: int, pretrained: bool = True, background: bool = True, method: str | None = None
) -> dict[str, Any]:
    """Values that work best for this kind of label and size of data set, by our measurements (docs/results.md).

    Args:
        supervision: Kind of label, or "auto".
        train_images: Number of training images.
        pretrained: Whether the encoder starts from weights; features of a random one are nothing to rely on.
        background: Whether class 0 is the background.
        method: Name of the one that the user chose; its values are in the result if there are any that suit it.
    """
    chosen: dict[str, Any] = {"name": "supervised"}
    # What somebody calls masks can be strokes: a method for these has its short-run values there too.
    if supervision != "masks" or method not in (None, "supervised", *TAG_METHODS):
        # The published set-up is for 90 000 iterations. In a short run the loss, if it acts on random predictions,
        # spreads the commonest class; it starts when there is something to spread. A colour width of 0.1 links
        # little but flat areas; a wider one carries labels further.
        chosen = {"name": "gated_crf", "start": 0.3, "kernels": [{"weight": 1.0, "xy": 6.0, "rgb": 0.4}]}
        if supervision == "points":
            # Half of all points are background. Labels from further sources add as much again as the Gated CRF loss.
            chosen |= {"class_weights": "counts", "absent": {}, "spread": {}, "teacher": {}}
            if pretrained and method is None:
                # A point an object is little to learn from, but a pretrained encoder knows what looks alike. Where it
                # does (`least`) that is better than all of the above, which harms dense labels.
                chosen |= {"propagate": {"alone": True, "tokens": {"images": background}}}
        else:
            # Scribbles lie everywhere, so nothing has to be carried far, and a wide reach erodes small structures: what
            # is missing are borders, which the loss sees at the image's own resolution.
            chosen |= {"stride": 1, "radius": 5, "kernels": [{"weight": 1.0, "xy": 5.0, "rgb": 0.4}]}
        if method == "dfr":
            # For the same reasons; the deep kernel waits until features tell classes apart.
            near = {} if supervision == "points" else {"radius": 2, "xy": 2.0}
            kept: dict[str, Any] = {
                key: chosen[key] for key in ("class_weights", "absent", "spread", "teacher") if key in chosen
            }
            chosen = {"name": "dfr", "start": 0.3, "deep_start": 0.5, "rgb": 0.4, **near, **kept}
    if supervision == "tags":
        chosen = {"name": "sfc" if method == "sfc" else "tags"}
        if not pretrained:
            # An encoder that knows nothing has to learn, and at more than a pretrained one's rate.
            chosen |= {"cam_learning_rate": 1e-4, "cam_head_factor": 30.0, "cam_frozen": 0.0}
            chosen |= {} if method == "sfc" else {"cams": {"kind": "classifier"}}
        if method == "tscd":
            chosen = {"name": "tscd"} | ({} if pretrained else {"frozen": 0.0})
    # A few hundred images train within minutes on a CPU; larger sets deserve more steps.
    iterations = int(min(4000, max(500, 100 * round(0.8 * train_images / 100))))
    optimisation: dict[str, Any] = {"iterations": iterations}
    if method == "tscd" and pretrained:
        # CAMs are taken from the encoder while it learns; `TagsSettings.cam_learning_rate`.
        optimisation |= {"learning_rate": 2e-5, "decoder_factor": 100.0}
    return {"supervision": supervision, "method": chosen, "optimisation": optimisation}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text; reading it back gives an equal recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return text
