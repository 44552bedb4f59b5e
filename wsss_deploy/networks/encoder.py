"""Any suitable timm model as an encoder of four feature maps."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from wsss_deploy.card import Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks.decoder import OUTPUT_STRIDE

LEVELS = 4
# What would make timm load files or download: a card may come from anywhere.
_NOT_OURS = frozenset(
    {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"}
)
# Numbers in options that a model takes: those that count blocks (`depth`, `layers`, `num_stages`, ...), which are built
# one after the other, and any other (channels, pixels).
_COUNT = re.compile("depth|layer|block|stage|repeat")
_MOST_BLOCKS, _MOST_NUMBERS, _LARGEST = 128, 1024, 16384
_FITTING = "such as a plain ViT, PVTv2 or ConvNeXt"

# How a timm model is told that images may have any size; models that need no telling take none of these.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class Encoder(nn.Module):
    """A timm model whose features are taken through `forward_intermediates`.

    Hierarchical models (PVTv2, Swin, TinyViT, ConvNeXt, ...) give their last four stages. Plain ViTs, where all maps
    have one size, give the blocks at 1/4, 1/2, 3/4 and the end of their depth; class and register tokens are left
    out. No map passes the model's final norm: decoders normalise each level themselves.

    Args:
        name: timm model name.
        options: Further keyword arguments of the timm model.
        drop_path: Stochastic depth rate.

    Attributes:
        channels: Channels of each map.
        reductions: Stride of each map in image pixels.
        stride: Height and width of the image must be multiples of this.

    Raises:
        RecipeError: timm has no such model, or it cannot serve as an encoder.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        extra = {"drop_path_rate": drop_path} if drop_path > 0 else {}
        self.name = name
        self.model: Any = create_timm(name, {**(options or {}), **extra})
        self.indices = _indices(self.model, name)
        self.stride = _stride(self.model)
        with torch.no_grad():
            training = self.model.training
            # Seen rather than declared: what the model's metadata says is not always what it does.
            probe = torch.zeros(1, 3, 2 * self.stride, 3 * self.stride)
            try:
                maps = self.eval()(probe)
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise RecipeError(
                    [f"encoder '{name}' cannot take images of any size ({reason}); choose another, {_FITTING}"]
                ) from error
            self.train(training)
        self.channels = tuple(level.shape[1] for level in maps)
        self.reductions = tuple(probe.shape[-1] // level.shape[-1] for level in maps)

    def prune(self) -> None:
        """Drop the parts that no map needs (classifier, pooling, final norm); call after loading weights."""
        if hasattr(self.model, "prune_intermediate_layers"):
            self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            image: Normalised (N, 3, H, W); H and W multiples of `stride`.

        Returns:
            Four maps (N, channels[i], H / reductions[i], W / reductions[i]), fine to coarse.
        """
        maps: list[Tensor] = self.model.forward_intermediates(image, indices=self.indices, intermediates_only=True)
        return maps


def create_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a timm model without weights and classifier, for images of any size where it can.

    Args:
        name: timm model name.
        options: Keyword arguments of the model; they win over ours.

    Raises:
        RecipeError: No such model, or an option that it does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else "; `timm.list_models()` lists them"
        raise RecipeError([f"encoder '{name}' is no model of timm {timm.__version__}{hint}"])
    forbidden = sorted(_NOT_OURS & set(options))
    if forbidden:
        raise RecipeError([f"encoder_options {', '.join(forbidden)}: weights are not loaded by options; take them out"])
    _check_numbers(options)
    reason = ""
    for any_size in _ANY_SIZE:
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **{**any_size, **options})
            return model
        except TypeError as error:
            reason = str(error)
    raise RecipeError([f"encoder '{name}' does not take {dict(options)} ({reason}); correct encoder_options"])


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse what would take for ever to build; what takes too much memory is seen when it has been built on "meta"."""
    for name, value in options.items():
        most = _MOST_BLOCKS if _COUNT.search(name) else _LARGEST
        numbers = list(_numbers(value))
        # Together, as blocks are given for each stage.
        found = sum(map(abs, numbers)) if most == _MOST_BLOCKS else max(map(abs, numbers), default=0)
        if not found <= most or len(numbers) > _MOST_NUMBERS:
            shown = str(value)[:60]
            raise RecipeError([f"encoder_options {name}: {shown} is beyond any model, at most {most}; lower it"])


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def encoder_preprocessing(encoder_name: str, encoder_options: Mapping[str, Any]) -> Preprocessing:
    """The normalisation with which timm trained the model, and the stride to which images are padded.

    Args:
        encoder_name: timm model name.
        encoder_options: Further keyword arguments of the timm model.

    Raises:
        RecipeError: timm has no such model.
    """
    with torch.device("meta"):  # the structure is enough; no memory, no initialisation
        model = create_timm(encoder_name, encoder_options)
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return Preprocessing(mean=tuple(config["mean"]), std=tuple(config["std"]), stride=_stride(model))


def _feature_strides(model: nn.Module) -> list[int]:
    info: Any = model.feature_info
    entries: Sequence[Mapping[str, Any]] = info if isinstance(info, list) else info.info
    return [int(entry["reduction"]) for entry in entries]


def _stride(model: nn.Module) -> int:
    # Logits have a quarter of the image's size, so that patches of 14 pixels ask for multiples of 28.
    return math.lcm(max(_feature_strides(model)), OUTPUT_STRIDE)


def _indices(model: nn.Module, name: str) -> list[int]:
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise RecipeError([f"encoder '{name}' offers no intermediate features in timm; choose another, {_FITTING}"])
    strides = _feature_strides(model)
    depth = len(strides)
    if len(set(strides)) > 1:
        return list(range(max(0, depth - LEVELS), depth))
    return sorted({math.ceil(depth * level / LEVELS) - 1 for level in range(1, LEVELS + 1)})
