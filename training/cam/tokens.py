"""Class activation maps from linear classifiers on the tokens of an encoder that stays as it was pretrained.

Two classifiers, both linear. The first tells images apart: the mean of a class's highest positions is the image's
score (between average and maximum pooling, arXiv 1512.04150 and 1411.6228). Its clear positions are seeds of classes
and background; the second learns from the seeds of the whole data set, then from what it is sure of itself among the
tags of each image (seeds and expansion, SEC, arXiv 1603.06098; here on frozen features). What one image cannot say,
that grass is no part of a sheep, many images say together: grass is with cows and horses too.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.cam.attention import AttentionTap, attention_layers
from training.cam.calibration import along_attention, along_correlation, prototype_maps, with_prototypes
from training.cam.head import CamHead, encode
from training.cam.objectness import Objectness
from training.cam.random_walk import label_parts, random_walk
from training.methods.cam_methods import CamModel
from training.methods.tag_settings import TokenSettings, WalkSettings
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import TrainingError
from wsss_deploy.networks.encoder import Encoder

_log = logging.getLogger(__name__)

_POSITIONS, _STEPS = 2048, 600
# Images a class with which the first classifier's scores count as much as objectness; parts of an image's positions
# that are seeds of its classes and of the background.
_TRUSTED = 40
_INSIDE, _OUTSIDE = 0.15, 0.4
# More steps than this an image teach a classifier of a few the images one by one.
_STEPS_AN_IMAGE = 16
_DECAY_IMAGES, _DECAY_POSITIONS = 0.01, 0.05
_HALF_MAX = 65504.0
#: Rows of a file that are looked at in one piece.
_PIECE = 1 << 16


class Tokens:
    """Normalised tokens of many images in a file, so that memory does not grow with the data set.

    Args:
        path: Of the file, float16 (rows, channels).
        sizes: Rows and columns of each image's grid of tokens.
        channels: Values in a row.

    Attributes:
        sizes: As given.
        starts: First row of each image, and the number of rows at the end; int64 (images + 1,).
    """

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]], channels: int) -> None:
        self.sizes = tuple(sizes)
        self.starts = np.cumsum([0, *(height * width for height, width in sizes)])
        self._rows = np.memmap(path, np.float16, "r", shape=(int(self.starts[-1]), channels))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def image(self, index: int) -> Tensor:
        """float32 (positions, channels) of one image."""
        return torch.from_numpy(self._rows[self.starts[index] : self.starts[index + 1]].astype(np.float32))

    def rows(self, indices: NDArray[np.int64]) -> Tensor:
        """float32 (len(indices), channels) of any positions."""
        return torch.from_numpy(self._rows[indices].astype(np.float32))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all positions, (channels,) each."""
        total, squares = (np.zeros(self._rows.shape[1]) for _ in range(2))
        for start in range(0, len(self._rows), _PIECE):
            piece = self._rows[start : start + _PIECE].astype(np.float64)
            total += piece.sum(axis=0)
            squares += (piece**2).sum(axis=0)
        mean = total / len(self._rows)
        deviation = np.sqrt((squares / len(self._rows) - mean**2).clip(0))
        return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


def collect_tokens(
    path: Path,
    encoder: Encoder,
    index: int,
    views: Iterable[Tensor],
    count: int = 1,
    objectness: Objectness | None = None,
) -> Tokens:
    """Write the tokens of images, each normalised to mean 0 and variance 1 over its channels.

    Args:
        path: Of the file to be made.
        encoder: In evaluation mode.
        index: Of the block or stage, as timm counts.
        views: Normalised images (1, 3, H, W) of any size.
        count: How many there are, for a look at the free space after the first.
        objectness: Of this encoder, active; takes up every image.

    Raises:
        TrainingError: They do not fit onto the disk.
    """
    sizes, channels = list[tuple[int, int]](), 0
    device = next(encoder.parameters()).device
    # Encoding ends behind the last block that is asked for.
    indices = [index] if objectness is None else [index, objectness.index]
    with path.open("wb") as file, torch.no_grad():
        for number, view in enumerate(views):
            found = encode(encoder, view.to(device), indices)[index][0].float()
            channels = found.shape[0]
            rows = F.layer_norm(found.flatten(1).T, (channels,)).clamp(-_HALF_MAX, _HALF_MAX)
            sizes.append((found.shape[1], found.shape[2]))
            file.write(rows.half().cpu().numpy().tobytes())
            if objectness is not None:
                objectness.add(sizes[-1])
            if number == 0:
                _check_space(path, 2 * rows.numel() * count)
    return Tokens(path, sizes, channels)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise TrainingError(
            f"{path.parent}: the features of all images need {needed / 1e9:.1f} GB while the first stage runs, free "
            f"are {free / 1e9:.1f}; make room, choose another --out, or a smaller long side"
        )


class OddsHead(CamHead):
    """A classifier whose scores are log-odds of the classes against the background.

    Args:
        encoder: Tells the channels; not kept.
        classes: Foreground classes K.
        depth: Fraction of the encoder's depth.
        pooling: Of the classifier of images that comes first.
    """

    def __init__(self, encoder: Encoder, classes: int, depth: float, pooling: float) -> None:
        super().__init__(encoder, classes, (depth,), pooling)

    @property
    def layers(self) -> tuple[nn.LayerNorm, nn.Conv2d]:
        """Normalisation and classifier."""
        pair: Any = self.classify[0]
        return pair[0], pair[1]


class TokenCams(CamModel):
    """Probabilities of the classes of an image from its tokens; learnt by `fit_tokens`.

    Args:
        settings: From the recipe.
        encoder: Tells channels.
        num_classes: With background.
    """

    knows_background = True

    def __init__(self, settings: TokenSettings, encoder: Encoder, num_classes: int) -> None:
        super().__init__(num_classes - 1)
        self.settings = settings
        self.head: OddsHead = OddsHead(encoder, num_classes - 1, settings.depth, settings.pooling)

    def cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Probabilities among the background and the image's own classes; see `CamModel.cams`."""
        return self.probabilities(encoder, image, F.pad(tags == 1, (1, 0), value=True))[:, 1:]

    @torch.no_grad()
    def class_maps(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor:
        """Probabilities of the background and of all classes, tagged or not, at the tokens' own resolution.

        The CAM of an image with a single tag says nothing about its background, and among its own classes alone all
        that is background is alike; see `CamModel.class_maps`.
        """
        index = self.head.indices[0]
        odds = self.head(encode(encoder, image, [index]))[index].float()
        return F.pad(odds, (0, 0, 0, 0, 1, 0)).softmax(dim=1)

    @torch.no_grad()
    def probabilities(
        self,
        encoder: Encoder,
        image: Tensor,
        possible: Tensor,
        given: Tensor | None = None,
        walk: WalkSettings | None = None,
    ) -> Tensor:
        """Probabilities among the classes that an image may hold, mean over scales.

        Args:
            encoder: In evaluation mode.
            image: Normalised (N, 3, H, W).
            possible: bool (N, C); one class at least in each image.
            given: Labels of pixels int64 (N, H', W'), 255 = none, from which `walk` carries labels on.
            walk: How it does; None leaves `given` alone.

        Returns:
            (N, C, H, W), 0 for impossible classes.
        """
        size, stride = image.shape[-2:], encoder.stride
        total = image.new_zeros(len(image), self.classes + 1, *size)
        for scale in self.settings.scales:
            sides = [max(stride, round(scale * side / stride) * stride) for side in size]
            view = image
            if tuple(sides) != tuple(size):
                view = F.interpolate(image, size=sides, mode="bilinear", align_corners=False, antialias=True)
            maps, feature = self._calibrated(encoder, view, possible)
            if walk is not None and given is not None:
                parts = label_parts(given, (maps.shape[-2], maps.shape[-1]), maps.shape[1])
                maps = random_walk(maps, feature, parts, walk.power, walk.restart)
            total += F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return total / len(self.settings.scales)

    @torch.no_grad()
    def prototype_cams(self, encoder: Encoder, image: Tensor, tags: Tensor) -> Tensor | None:
        """Probabilities by prototypes at the image's own scale; see `CamModel.prototype_cams`."""
        if self.settings.calibration is None:
            return None
        maps, feature = self._correlated(encoder, image, F.pad(tags == 1, (1, 0), value=True))
        voted = prototype_maps(maps, feature, self.settings.calibration.seeds)
        if voted is None:
            return None
        return F.interpolate(voted[0][:, 1:], size=image.shape[-2:], mode="bilinear", align_corners=False)

    def _calibrated(self, encoder: Encoder, view: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (N, C, h, w) of one view's positions, and their features as in `_correlated`."""
        maps, feature = self._correlated(encoder, view, possible)
        calibration = self.settings.calibration
        if calibration is not None:
            maps = with_prototypes(maps, feature, calibration.seeds, calibration.fusion)
        return maps, feature

    def _shares_the_last_grid(self, encoder: Encoder) -> bool:
        """Whether the encoder's last blocks have attention over the positions of the CAM."""
        # Blocks of a plain ViT share one grid; the stages of others differ.
        same = len(set(encoder.reductions)) == 1 or self.head.indices[0] == max(encoder.indices)
        return same and bool(attention_layers(encoder))

    def _correlated(self, encoder: Encoder, view: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
        """The same before prototypes, and the positions' features (N, D, h, w), of mean 0 over the data set."""
        index, calibration = self.head.indices[0], self.settings.calibration
        tap, indices = None, [index]
        if calibration is not None and calibration.attention and self._shares_the_last_grid(encoder):
            # The last blocks' attention: as far as the encoder goes.
            tap, indices = AttentionTap(encoder), [index, max(encoder.indices)]
        with tap or nullcontext():
            maps = encode(encoder, view, indices)
        normalise, classifier = self.head.layers
        feature = normalise(maps[index])
        odds = F.pad(classifier(feature).float(), (0, 0, 0, 0, 1, 0))
        found, feature = odds.masked_fill(~possible[:, :, None, None], -torch.inf).softmax(dim=1), feature.float()
        if calibration is None:
            return found, feature
        if tap is not None:
            found = along_attention(found, tap.pairs(), tap.scale, calibration.attention)
        return along_correlation(found, feature, calibration.power, calibration.steps), feature


def fit_tokens(
    model: TokenCams,
    tokens: Tokens,
    possible: Tensor,
    seed: int,
    known: NDArray[np.uint8] | None = None,
    objectness: Sequence[NDArray[np.float32]] | None = None,
) -> None:
    """Learn both classifiers.

    Args:
        model: Its head is changed in place.
        tokens: Of the images.
        possible: The classes that each of them holds, bool (images, C).
        seed: Of the order in which they are seen.
        known: Labels of all positions, 255 = none, which take the place of the first classifier's seeds unless
            `TokenSettings.images` asks for both. None: there are none.
        objectness: Of each image's positions (`Objectness.maps`), from which seeds are chosen together with the first
            classifier where images are few; None leaves it to the classifier alone.
    """
    settings = model.settings
    mean, deviation = tokens.moments()
    scale = 1 / deviation.clamp(min=1e-6)
    shift = -mean * scale
    generator = np.random.default_rng(seed)

    def features(rows: Tensor) -> Tensor:
        return rows * scale + shift

    labels = np.full(int(tokens.starts[-1]), IGNORE_INDEX, np.uint8)
    if known is None or settings.images:
        first = _learn_images(tokens, features, possible[:, 1:].float(), settings, generator)
        weight, bias = first.weight.detach(), first.bias.detach()
        if objectness is None:
            labels = _seeds(tokens, features, first, possible, settings)
        else:
            labels = _object_seeds(tokens, features, first, possible, objectness)
    for _ in range(settings.rounds):
        if known is not None:
            labels = np.where(known == IGNORE_INDEX, labels, known)
        second = _learn_positions(tokens, features, labels, possible.shape[1], settings.learning_rate / 3, generator)
        found = _sure(tokens, features, second, possible, settings.sure)
        # Sure of nothing: the next round has what this one had.
        labels = found if (found != IGNORE_INDEX).any() else labels
        weight, bias = second.weight[1:] - second.weight[:1], second.bias[1:] - second.bias[:1]
    normalise, classifier = model.head.layers
    with torch.no_grad():
        normalise.weight.copy_(scale)
        normalise.bias.copy_(shift)
        classifier.weight.copy_(weight[:, :, None, None])
        assert classifier.bias is not None
        classifier.bias.copy_(bias)


def recall_of(model: TokenCams, tokens: Tokens, possible: Tensor, known: NDArray[np.uint8]) -> float:
    """Mean over classes of the part of known positions whose likeliest possible class is the known one.

    Args:
        model: Fitted.
        tokens: Of the images.
        possible: As in `fit_tokens`.
        known: As in `fit_tokens`.

    Returns:
        In [0, 1]; NaN without any known position.
    """
    normalise, classifier = model.head.layers
    hits, totals = (np.zeros(possible.shape[1]) for _ in range(2))
    with torch.no_grad():
        for index, own in enumerate(possible):
            given = known[tokens.starts[index] : tokens.starts[index + 1]]
            at = np.flatnonzero(given != IGNORE_INDEX)
            rows = tokens.image(index)[at] * normalise.weight + normalise.bias
            odds = F.pad(F.linear(rows, classifier.weight.flatten(1), classifier.bias), (1, 0))
            found = odds.masked_fill(~own, -torch.inf).argmax(dim=1).numpy()
            np.add.at(totals, given[at], 1)
            np.add.at(hits, given[at], found == given[at])
    seen = totals > 0
    return float((hits[seen] / totals[seen]).mean()) if seen.any() else float("nan")


_Features = Callable[[Tensor], Tensor]


def _optimise(layer: nn.Linear, rate: float, decay: float, steps: int, loss: Callable[[], Tensor]) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, steps)
    threads = torch.get_num_threads()
    # Steps of less than a millisecond: on a busy machine threads wait for each other longer than they work.
    torch.set_num_threads(1)
    try:
        for _ in range(steps):
            optimiser.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)


def _learn_images(
    tokens: Tokens, features: _Features, present: Tensor, settings: TokenSettings, generator: np.random.Generator
) -> nn.Linear:
    """Scores of positions whose highest tell an image's classes."""
    layer = nn.Linear(len(features(tokens.image(0))[0]), present.shape[1])

    def loss() -> Tensor:
        chosen = generator.integers(len(tokens), size=settings.batch_size)
        scores = []
        for index in chosen:
            maps: Tensor = layer(features(tokens.image(index)))
            highest = maps.topk(max(1, round(settings.pooling * len(maps))), dim=0).values
            scores.append(highest.mean(dim=0))
        return F.binary_cross_entropy_with_logits(torch.stack(scores), present[chosen])

    steps = min(settings.iterations, _STEPS_AN_IMAGE * len(tokens))
    _optimise(layer, settings.learning_rate, _DECAY_IMAGES, steps, loss)
    return layer


@torch.no_grad()
def _seeds(
    tokens: Tokens, features: _Features, layer: nn.Linear, possible: Tensor, settings: TokenSettings
) -> NDArray[np.uint8]:
    """Labels of positions that the first classifier is clear about, 255 elsewhere."""
    labels = np.full(int(tokens.starts[-1]), IGNORE_INDEX, np.uint8)
    for index, own in enumerate(possible[:, 1:]):
        chances: Tensor = layer(features(tokens.image(index))).sigmoid() * own
        # A class that the classifier is unsure of is still somewhere, one that it is sure of not everywhere: the
        # geometric mean of the chance itself and of its part of the image's highest.
        scores = chances / chances.amax(dim=0).clamp(min=1e-6).sqrt()
        value, best = scores.max(dim=1)
        found = torch.where(value > settings.foreground, best + 1, IGNORE_INDEX)
        found = torch.where(value < settings.background, 0, found)
        labels[tokens.starts[index] : tokens.starts[index + 1]] = found.numpy()
        # Every class has a seed in each of its images, and each image one of the background, however vague the scores.
        labels[tokens.starts[index] + int(value.argmin())] = 0
        for kind in own.nonzero()[:, 0].tolist():
            labels[tokens.starts[index] + int(scores[:, kind].argmax())] = kind + 1
    return labels


@torch.no_grad()
def _object_seeds(
    tokens: Tokens,
    features: _Features,
    layer: nn.Linear,
    possible: Tensor,
    objectness: Sequence[NDArray[np.float32]],
) -> NDArray[np.uint8]:
    """Labels of the positions that look most and least like an object of a class of the image, 255 elsewhere.

    The more images a class has, the more the classifier's word counts beside what was known before.
    """
    labels = np.full(int(tokens.starts[-1]), IGNORE_INDEX, np.uint8)
    weight = images_per_class(possible) / _TRUSTED
    for index, own in enumerate(possible[:, 1:]):
        target = labels[tokens.starts[index] : tokens.starts[index + 1]]
        kinds = own.nonzero()[:, 0]
        if not len(kinds):
            target[:] = 0
            continue
        scores: Tensor = layer(features(tokens.image(index)))[:, kinds]
        value, best = scores.max(dim=1)
        spread = value.std(unbiased=False)
        likely = torch.from_numpy(objectness[index]) + weight * (value - value.mean()) / spread.clamp(min=1e-6)
        order = likely.argsort(descending=True, stable=True).numpy()
        target[order[len(order) - max(1, round(_OUTSIDE * len(order))) :]] = 0
        chosen = order[: max(1, round(_INSIDE * len(order)))]
        target[chosen] = kinds[best].numpy()[chosen] + 1
        # Every class has a seed in each of its images, as without objectness: of two, one may be all that is likely.
        for column, kind in enumerate(kinds.tolist()):
            target[int(scores[:, column].argmax())] = kind + 1
    return labels


def images_per_class(possible: Tensor) -> float:
    """Median over the foreground classes that any image has of how many have it; 0 without any.

    Args:
        possible: bool (images, C), the background first.
    """
    counts = possible[:, 1:].sum(dim=0)
    counts = counts[counts > 0]
    return float(np.median(counts.numpy())) if len(counts) else 0.0


def _learn_positions(
    tokens: Tokens,
    features: _Features,
    labels: NDArray[np.uint8],
    classes: int,
    rate: float,
    generator: np.random.Generator,
) -> nn.Linear:
    """Classes of single positions, the background among them; rarer ones weigh more."""
    known = np.flatnonzero(labels != IGNORE_INDEX)
    counts = torch.from_numpy(np.bincount(labels[known], minlength=classes)).float()
    weights = (counts.sum() / counts.clamp(min=1)).sqrt() * (counts > 0)
    weights = weights / weights.sum() * classes
    layer = nn.Linear(len(features(tokens.image(0))[0]), classes)

    def loss() -> Tensor:
        chosen = known[generator.integers(len(known), size=_POSITIONS)]
        scores: Tensor = layer(features(tokens.rows(chosen)))
        return F.cross_entropy(scores, torch.from_numpy(labels[chosen]).long(), weight=weights)

    _optimise(layer, rate, _DECAY_POSITIONS, _STEPS, loss)
    return layer


@torch.no_grad()
def _sure(
    tokens: Tokens, features: _Features, layer: nn.Linear, possible: Tensor, threshold: float
) -> NDArray[np.uint8]:
    """What the second classifier is sure of among the background and each image's own classes, 255 elsewhere."""
    labels = np.full(int(tokens.starts[-1]), IGNORE_INDEX, np.uint8)
    for index, own in enumerate(possible):
        scores: Tensor = layer(features(tokens.image(index)))
        value, best = scores.masked_fill(~own, -torch.inf).softmax(dim=1).max(dim=1)
        found = torch.where(value > threshold, best, IGNORE_INDEX)
        labels[tokens.starts[index] : tokens.starts[index + 1]] = found.numpy()
    return labels
