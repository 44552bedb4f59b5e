"""From a data set to training batches: augmentation, a sampler that can resume, and the loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data.dataset import KINDS, PIXEL_KINDS, DataSource, has_background
from training.data.transforms import (
    Window,
    change_colours,
    crop_dense,
    crop_image,
    crop_points,
    crop_scribbles,
    draw_window,
    grow_points,
    valid_area,
)
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError, UsageError

_log = logging.getLogger(__name__)

# About the mean of ImageNet, so that padding is near 0 after normalisation.
_FILL = (124, 116, 104)
_CACHE_BYTES = 512 * 2**20  # in each loading process
_WINDOW_TRIES = 4

Strength = Annotated[float, Field(ge=0, lt=1)]


class Photometric(BaseModel):
    """Random colours.

    Attributes:
        brightness: The factor is drawn from 1 ± this.
        contrast: The same.
        saturation: The same.
        hue: The turn of the colour circle is drawn from ± this; 0.5 is all colours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    brightness: Strength = 0.3
    contrast: Strength = 0.3
    saturation: Strength = 0.3
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.03


class Augmentation(BaseModel):
    """How a training sample is cut from an image.

    Attributes:
        size: Side of the square crop in pixels.
        scale: Range of the scaled image's longer side in units of `size`, drawn evenly in the logarithm. At 1 the
            whole image just fits into the crop.
        flip: Probability of a left-right flip.
        photometric: Random colours; None leaves them as they are.
        point_radius: Points become discs of this radius in the crop, since one pixel alone is a weak signal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=32, le=4096)] = 256
    scale: tuple[Annotated[float, Field(gt=0, le=16)], Annotated[float, Field(gt=0, le=16)]] = (0.75, 1.5)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    photometric: Photometric | None = Photometric()
    point_radius: Annotated[int, Field(ge=0, le=64)] = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is {self.scale}, expected (smallest, largest)")
        return self


@dataclass(frozen=True)
class _Item:
    image: NDArray[np.uint8]
    labels: Mapping[str, NDArray[np.uint8]]
    labelled: NDArray[np.bool_]

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + sum(labels.nbytes for labels in self.labels.values())


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Training samples; item `(index, position)` is a function of `seed`, `index` and `position` alone.

    An item holds "image" uint8 (3, S, S); "labels" int64 (S, S), 255 = unlabelled; "valid" bool (S, S), True inside
    the image; "tags" float32 (K,), 1 and 0 where tags say so, NaN where nothing is known (an image without tags; the
    background, which tags leave out); "labelled" bool (K,), the classes of which the whole image holds a label, and
    the background where it holds any: as with tags, it may be anywhere.

    Where an image has several of the kinds, masks are laid first, then scribbles where there is no label yet, then
    points. A crop without any label is drawn again a few times, since it would teach nothing.

    Args:
        source: The data set.
        names: Images to use; those with none of `kinds` are left out, and the log says how many.
        kinds: Kinds of labels to use. "auto" lets each image contribute the densest it has: masks, else scribbles
            over points; images with nothing but tags are left out.
        augmentation: Crops and colours.
        seed: Seed of all randomness.

    Raises:
        DataError: No image has any of `kinds`.
        UsageError: Unknown kinds.
    """

    def __init__(
        self,
        source: DataSource,
        names: Sequence[str],
        kinds: tuple[str, ...] | Literal["auto"],
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        unknown = [] if kinds == "auto" else [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            given = ", ".join(unknown) or "none given"
            raise UsageError(f"unknown kinds of labels: {given}; expected some of {', '.join(KINDS)}")
        self.source, self.augmentation, self.seed = source, augmentation, seed
        self._auto = kinds == "auto"
        self._asked = frozenset(PIXEL_KINDS if kinds == "auto" else kinds)
        self.names = tuple(name for name in names if source.kinds(name) & self._asked)
        what = "labels" if kinds == "auto" else " or ".join(kinds)
        if not self.names:
            tagged = sum(source.tags(name) is not None for name in names)
            hint = f"{tagged} have tags: use --supervision tags" if tagged else "add them or choose another kind"
            raise DataError(f"{source.name}: none of {len(names)} images has {what}; {hint}")
        if len(self.names) < len(names):
            _log.warning(
                "%s: %d of %d images have no %s and are left out",
                source.name,
                len(names) - len(self.names),
                len(names),
                what,
            )
        self._cache: dict[int, _Item] = {}
        self._cached = 0

    def __len__(self) -> int:
        """Number of images with labels."""
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """The sample of image `index` at `position`, its running number in the run; see the class.

        Raises:
            DataError: A file of this image cannot be used.
        """
        index, position = key
        rng = np.random.default_rng([self.seed, position])
        item, options = self._item(index), self.augmentation
        low, high = np.log(options.scale)
        scale = float(np.exp(rng.uniform(low, high)))
        window = self._draw_window(item, scale, rng)
        image = crop_image(item.image, window, _FILL)
        valid = valid_area(window)
        labels = self._crop_labels(item.labels, window, valid)
        if rng.random() < options.flip:
            image, labels, valid = image[:, ::-1], labels[:, ::-1], valid[:, ::-1]
        if options.photometric is not None:
            image = change_colours(np.ascontiguousarray(image), *_draw_colours(options.photometric, rng))
            image[~valid] = _FILL
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "valid": torch.from_numpy(np.ascontiguousarray(valid)),
            "tags": torch.from_numpy(self._tag_vector(self.names[index])),
            "labelled": torch.from_numpy(item.labelled),
        }

    def _draw_window(self, item: _Item, scale: float, rng: np.random.Generator) -> Window:
        size = self.augmentation.size
        source = (item.image.shape[0], item.image.shape[1])
        for _ in range(_WINDOW_TRIES):
            window = draw_window(source, size, scale, rng)
            if not item.labels or any(_any_label(labels, window) for labels in item.labels.values()):
                break
        return window

    def _crop_labels(
        self, layers: Mapping[str, NDArray[np.uint8]], window: Window, valid: NDArray[np.bool_]
    ) -> NDArray[np.uint8]:
        out = np.full(valid.shape, IGNORE_INDEX, np.uint8)
        for kind in PIXEL_KINDS:
            if kind not in layers:
                continue
            if kind == "points":
                layer = grow_points(crop_points(layers[kind], window), self.augmentation.point_radius, valid)
            else:
                layer = (crop_dense if kind == "masks" else crop_scribbles)(layers[kind], window)
            np.copyto(out, layer, where=out == IGNORE_INDEX)
        return out

    def _tag_vector(self, name: str) -> NDArray[np.float32]:
        classes = self.source.classes
        tags = self.source.tags(name)
        vector = np.full(len(classes), np.nan if tags is None else 0, np.float32)
        if has_background(classes):
            vector[0] = np.nan
        vector[list(tags or ())] = 1
        return vector

    def _item(self, index: int) -> _Item:
        item = self._cache.get(index)
        if item is None:
            item = self._load(self.names[index])
            # Never evicted: with a new order each epoch, keeping the first images hits as often as any other rule.
            if self._cached + item.nbytes <= _CACHE_BYTES:
                self._cache[index] = item
                self._cached += item.nbytes
        return item

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """The kinds of label maps that an image contributes, densest first."""
        kinds = self.source.kinds(name) & self._asked
        if self._auto and "masks" in kinds:
            return ("masks",)
        return tuple(kind for kind in PIXEL_KINDS if kind in kinds)

    def _load(self, name: str) -> _Item:
        image = self.source.load_image(name)
        labels = {kind: self.source.load_labels(name, kind) for kind in self.kinds_of(name)}
        for kind, layer in labels.items():
            if layer.shape != image.shape[:2]:
                raise DataError(
                    f"{self.source.name}: {kind} of '{name}' are {layer.shape} (height, width), the image "
                    f"{image.shape[:2]}; expected equal sizes"
                )
        return self._shrink(image, labels)

    def _shrink(self, image: NDArray[np.uint8], labels: Mapping[str, NDArray[np.uint8]]) -> _Item:
        """Bring an image that is larger than any crop needs down to the largest scale, once, before the cache."""
        source = (image.shape[0], image.shape[1])
        largest = int(np.ceil(self.augmentation.size * self.augmentation.scale[1]))
        labelled = np.zeros(IGNORE_INDEX + 1, np.bool_)
        for layer in labels.values():
            labelled[layer] = True
        labelled = labelled[: len(self.source.classes)]
        if has_background(self.source.classes):
            labelled[0] |= labelled.any()
        if max(source) <= largest:
            return _Item(image, labels, labelled)
        # A square window that holds the whole scaled image; what lies outside is cut off again.
        window = draw_window(source, largest, 1.0, np.random.default_rng(0), place=(0.0, 0.0))
        height, width = window.scaled
        crops = {"masks": crop_dense, "scribbles": crop_scribbles, "points": crop_points}
        small = {kind: crops[kind](layer, window)[:height, :width].copy() for kind, layer in labels.items()}
        return _Item(crop_image(image, window, _FILL)[:height, :width].copy(), small, labelled)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which each loading process fills by itself."""
        return self.__dict__ | {"_cache": {}, "_cached": 0}


def _any_label(labels: NDArray[np.uint8], window: Window) -> bool:
    """Whether the part of `labels` (H, W) under the window, rounded inwards, holds a label."""
    bounds = []
    for axis in (0, 1):
        first, last, start = window.span(axis)
        step = labels.shape[axis] / window.scaled[axis]
        bounds.append(slice(int(start * step), int(np.ceil((start + last - first) * step))))
    return bool((labels[bounds[0], bounds[1]] != IGNORE_INDEX).any())


def _draw_colours(settings: Photometric, rng: np.random.Generator) -> tuple[float, float, float, float]:
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
    return (
        1 + settings.brightness * brightness,
        1 + settings.contrast * contrast,
        1 + settings.saturation * saturation,
        settings.hue * hue,
    )


class PositionSampler(Sampler[tuple[int, int]]):
    """Endless (index, position) pairs: each epoch is a fresh permutation, and a run can go on at any position.

    Args:
        count: Number of images.
        seed: Seed of the permutations.
        start: First position; 0 begins the run.
    """

    def __init__(self, count: int, seed: int, start: int = 0) -> None:
        self.count, self.seed, self.start = count, seed, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start
        while True:
            epoch, first = divmod(position, self.count)
            # The third number keeps these streams apart from the samples' [seed, position].
            order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.count)
            for index in order[first:]:
                yield int(index), position
                position += 1


def make_loader(
    dataset: TrainingSet, batch_size: int, sampler: PositionSampler, workers: int
) -> DataLoader[dict[str, Tensor]]:
    """Batches without end.

    Args:
        dataset: Samples.
        batch_size: Samples a batch.
        sampler: Order.
        workers: Loading processes; 0 loads in this one.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
