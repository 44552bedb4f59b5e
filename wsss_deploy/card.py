"""The model card: the one source of truth that training writes and every artifact carries.

Architecture, classes, palette, pre-processing, sizing plan, refinement and protocol live here and nowhere else;
predict, export, parity, demo and serving all read them from the card. The card is plain data (JSON), so that a file
can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsss_deploy.errors import ArtifactError
from wsss_deploy.pairwise.guides import Guide
from wsss_deploy.pairwise.parameters import PairwiseParameters
from wsss_deploy.text import has_controls, visible

FORMAT_VERSION = 1
IGNORE_INDEX = 255
#: Pixels a side of an image or a window that a card may ask a network to see at once.
LARGEST_SIDE = 16384

Color = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]


def _shown(text: str) -> str:
    if has_controls(text):
        raise ValueError(f"{text!a} holds control characters, expected a text of one line; name it without them")
    return text


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty, expected a name")
    return text


# Cards come from strangers, and their texts reach terminals, pages and tables.
_Text = Annotated[str, AfterValidator(_shown)]
_Name = Annotated[_Text, AfterValidator(_named)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Architecture(_Plain):
    """How to rebuild the network.

    Attributes:
        encoder: timm model name.
        decoder: Decoder name, see `wsss_deploy.networks`.
        decoder_width: Channels inside the decoder.
        encoder_options: Further keyword arguments of the timm model (for example `img_size`).
    """

    encoder: _Text
    decoder: _Text = "mlp"
    decoder_width: Annotated[int, Field(ge=8, le=4096)] = 256
    encoder_options: dict[str, Any] = Field(default_factory=dict)


# What float32 bears, with room beyond every normalisation in use.
_Mean = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
_Std = Annotated[float, Field(ge=1e-4, le=1e4, allow_inf_nan=False)]


class Preprocessing(_Plain):
    """Normalisation inside the graph: (value / 255 - mean) / std per RGB channel; sides padded to `stride`.

    Attributes:
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        stride: The graph pads height and width to a multiple of this many pixels (edge values, right and bottom).
        fixed_size: The graph pads height and width to exactly this many pixels instead, a multiple of the stride, and
            takes no larger image; for networks that work at one size only (windows picked by the image's size).
    """

    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]
    stride: Annotated[int, Field(ge=1, le=1024)]
    fixed_size: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fixed_size is not None and self.fixed_size % self.stride:
            raise ValueError(f"fixed_size is {self.fixed_size}, expected a multiple of the stride {self.stride}")
        return self


class Sizing(_Plain):
    """How the runtime brings an image to the size at which the network works.

    Attributes:
        long_side: The longer side is resized to about this many pixels (both sides rounded to the network's
            stride); None keeps the image's own size.
        max_long_side: With `long_side` None, a larger image is resized down to this many pixels.
        tile: Images keep their size, and those with a longer side than this are cut into overlapping windows of so
            many pixels a side (`wsss_deploy.tiling`); None never cuts.
        overlap: Pixels that neighbouring windows share, at most half a tile.
    """

    long_side: Annotated[int, Field(ge=16, le=LARGEST_SIDE)] | None = None
    max_long_side: Annotated[int, Field(ge=16, le=LARGEST_SIDE)] = 1024
    tile: Annotated[int, Field(ge=16, le=LARGEST_SIDE)] | None = None
    overlap: Annotated[int, Field(ge=0, le=8192)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tile is not None and self.overlap > self.tile // 2:
            raise ValueError(f"overlap is {self.overlap}, expected at most {self.tile // 2}, half of the tile")
        return self


class Refinement(_Plain):
    """Refinement of the scores along the image, at the size at which the network sees it.

    Attributes:
        parameters: The pairwise operator: affinity, neighbours, steps. They have to keep scores probabilities:
            `normalise`, or a mean-field form.
        guide: Colours along which it works: "rgb" is the image in [0, 1]; "opponent" is brightness, red against
            green and yellow against blue (`wsss_deploy.pairwise.guides`).
        enabled: Whether it is on by default.
        in_graph: The model's graph refines by itself; only an exported artifact says so.
    """

    parameters: PairwiseParameters
    guide: Guide = "rgb"
    enabled: bool = True
    in_graph: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.parameters.normalise and self.parameters.mean_field is None:
            raise ValueError("refined scores have to stay probabilities: set normalise, or a mean-field form")
        if any(term.sigma_features is not None for term in self.parameters.terms):
            raise ValueError(f"the guide '{self.guide}' has colours alone: leave sigma_features out of the terms")
        return self

    def __str__(self) -> str:
        parameters = self.parameters
        neighbours = f"{len(parameters.offsets)} neighbours up to {parameters.reach} px"
        form = ", mean field" if parameters.mean_field is not None else ""
        return f"{parameters.kind} over {self.guide}, {neighbours}, {parameters.iterations} steps{form}"


class Protocol(_Plain):
    """How the model was trained and how its figures came about; what a reader needs to trust a number.

    Attributes:
        supervision: Kinds of labels that were used, for example ["scribbles"].
        simulated: Whether the weak labels were simulated from masks.
        method: Name of the training method.
        data: Name of the data set (never a path).
        train_images: Number of training images.
        iterations: Optimiser steps.
        batch_size: Images a step.
        size: Training crop, pixels a side.
        seed: Seed of the run.
        weights: Where the encoder's weights came from: "timm", "none" or a file name.
        selection: How the checkpoint was chosen: "best-val-miou" or "last".
        metrics: Figures by name, for example {"val_miou": 0.81}.
        notes: Anything else by name.
    """

    supervision: tuple[_Text, ...]
    simulated: bool = False
    method: _Text
    data: _Text
    train_images: int
    iterations: int
    batch_size: int
    size: int
    seed: int
    weights: _Text
    selection: _Text
    metrics: dict[_Text, float] = Field(default_factory=dict)
    notes: dict[_Text, _Text] = Field(default_factory=dict)


class ModelCard(_Plain):
    """Everything about a model but its tensors; see the module's text."""

    format_version: int = FORMAT_VERSION
    name: _Name
    classes: Annotated[tuple[_Name, ...], Field(min_length=2, max_length=255)]
    palette: tuple[Color, ...]
    architecture: Architecture
    preprocessing: Preprocessing
    sizing: Sizing = Sizing()
    refinement: Refinement | None = None
    protocol: Protocol | None = None
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    versions: dict[_Text, _Text] = Field(default_factory=dict)
    digests: dict[_Text, _Text] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version}, this release reads {FORMAT_VERSION}; "
                "install the release that wrote the file"
            )
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.palette)} palette colours for {len(self.classes)} classes")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names are not unique")
        return self

    def to_json(self) -> str:
        """The card as JSON text."""
        return self.model_dump_json()

    def to_plain(self) -> dict[str, Any]:
        """The card as dictionaries, lists, strings and numbers only."""
        plain: dict[str, Any] = json.loads(self.model_dump_json())
        return plain

    @classmethod
    def from_plain(cls, data: object, source: str) -> ModelCard:
        """Read a card from plain data.

        Args:
            data: What `to_plain` gave (or JSON text).
            source: Name of the file it came from, for the error.

        Raises:
            ArtifactError: The data is no card of this format; all problems are named.
        """
        try:
            if isinstance(data, str | bytes):
                return cls.model_validate_json(data)
            # Through JSON, so that lists from any container become the tuples that the model declares.
            return cls.model_validate_json(json.dumps(data))
        except (ValidationError, TypeError, ValueError) as error:
            raise ArtifactError(f"{source}: its model card cannot be used: {problems(error)}") from error


def problems(error: Exception) -> str:
    """What is wrong with the data of a card, in one line.

    Args:
        error: What reading or making it raised.
    """
    if isinstance(error, ValidationError):
        found = error.errors()
        # pydantic also counts what is left of a list without its bad items.
        inner = {item["loc"][:-1] for item in found}
        found = [item for item in found if item["type"] != "too_short" or item["loc"] not in inner]
        told = (f"{'.'.join(map(str, item['loc'])) or 'card'}: {item['msg']}" for item in found)
        return visible("; ".join(told), keep="")
    return str(error)


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The PASCAL VOC colour map: class 0 black, then colours that differ in as many bits as possible.

    Args:
        count: Number of classes, at most 256.
    """
    colors: list[tuple[int, int, int]] = []
    for index in range(count):
        channels, bits = [0, 0, 0], index
        for shift in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


def palette_bytes(palette: Sequence[Sequence[int]]) -> bytes:
    """The 768 bytes of a palette PNG: the classes' colours, and white for 255 (unlabelled)."""
    table = bytearray(768)
    for index, color in enumerate(palette):
        table[3 * index : 3 * index + 3] = bytes(color)
    table[765:768] = b"\xff\xff\xff"
    return bytes(table)
