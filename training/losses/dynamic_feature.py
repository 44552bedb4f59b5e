"""Losses of the feature consistency head of DFR, the Dynamic Feature Regularized loss.

Zhang, Xiao, Zhao, "Dynamic Feature Regularized Loss for Weakly Supervised Semantic Segmentation", arXiv 2108.01296.
Its code was never released. That a feature consistency head learns pair-wise relations of deep features is fact; the
equations are a reconstruction after the first author's released A2GNN code (docs/sparse_labels.md says what is which).
The kernel that uses the features is a plain Gated CRF kernel with a further modality, see `training.methods.dfr`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses.gated_crf import XY, Kernel
from training.losses.pair_distance import Distance, Pairs, PairSums, half_window
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import UsageError

BACKGROUND = 0
SHARES = (0.25, 0.25, 0.5)
_EPSILON = 1e-5
# Of the affinity sigmoid(cos / temperature); ours, the precursor has no cosine.
_TEMPERATURE = 0.2


def block_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels of a coarser map: that of any labelled pixel of a block if all its labelled ones agree, else 255.

    Sampling a pixel of each block would lose thin scribbles.

    Args:
        labels: int64 (N, H, W); 255 is unlabelled.
        size: (h, w) of the coarser map; H / h and W / w are the same whole number.

    Returns:
        int64 (N, h, w).

    Raises:
        UsageError: Sizes that do not divide.
    """
    stride = _stride(labels, size)
    labelled = labels != IGNORE_INDEX
    values = labels.to(torch.float32)  # max_pool2d takes no integers; class ids are exact
    highest = F.max_pool2d(values.masked_fill(~labelled, -1), stride)
    lowest = -F.max_pool2d(-values.masked_fill(~labelled, 2 * IGNORE_INDEX), stride)
    agreed = (highest == lowest) & (highest >= 0)
    return torch.where(agreed, highest, torch.full_like(highest, IGNORE_INDEX)).long()


def unlabelled_blocks(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells of a coarser map without any label; those whose labels contradict have none in `block_labels` and are not.

    Args:
        labels: int64 (N, H, W); 255 is unlabelled.
        size: (h, w) of the coarser map; H / h and W / w are the same whole number.

    Returns:
        bool (N, h, w).

    Raises:
        UsageError: Sizes that do not divide.
    """
    labelled = (labels != IGNORE_INDEX)[:, None].float()
    return F.max_pool2d(labelled, _stride(labels, size))[:, 0] == 0


def _stride(labels: Tensor, size: tuple[int, int]) -> int:
    (height, width), (h, w) = labels.shape[-2:], size
    if height % h or width % w or height * w != width * h:
        raise UsageError(f"labels are {height}x{width}, the map {h}x{w}; expected one whole stride on both axes")
    return int(height // h)


def pair_targets(labels: Tensor, probabilities: Tensor | None, threshold: float, free: Tensor | None = None) -> Tensor:
    """Targets of the head: labels where there are any, else the predicted class where it is likely enough.

    Args:
        labels: int64 (N, h, w); 255 is unlabelled.
        probabilities: (N, C, h, w), taken as constants; None leaves unlabelled pixels at 255.
        threshold: Least probability of a predicted class that counts.
        free: bool (N, h, w), where predictions may stand in; None is wherever labels are 255.

    Returns:
        int64 (N, h, w).
    """
    if probabilities is None:
        return labels
    likely, predicted = probabilities.detach().max(dim=1)
    predicted = predicted.masked_fill(likely < threshold, IGNORE_INDEX)
    taken = labels == IGNORE_INDEX if free is None else (labels == IGNORE_INDEX) & free
    return torch.where(taken, predicted, labels)


@dataclass(frozen=True)
class ConsistencyLoss:
    """Value of `feature_consistency_loss`.

    Attributes:
        total: Scalar with gradient.
        parts: Means over the three sets of pairs (3,): both background, both of one other class, of two classes.
        counts: Ordered pairs in the sets (3,).
    """

    total: Tensor
    parts: Tensor
    counts: Tensor


def feature_consistency_loss(
    features: Tensor,
    targets: Tensor,
    radius: int,
    *,
    distance: Distance = "l1",
    label_pad: int = IGNORE_INDEX,
    count_centre: bool = False,
) -> ConsistencyLoss:
    r"""Pair-wise supervision of deep features (reconstruction, after A2GNN's affinity loss).

    .. math:: L = 1/4 mean_{B+} -log(a + e) + 1/4 mean_{F+} -log(a + e) + 1/2 mean_{Neg} -log(1 - a + e)

    over ordered pairs in the square window of which both pixels have a target: B+ both background, F+ both of the
    same other class, Neg of different classes. e = 1e-5; a mean is sum / (count + 1e-5), so an empty set gives 0. The
    affinity is a = exp(-mean_c |g_i - g_j|) ("l1", the precursor's) or sigmoid(5 cos(g_i, g_j)) ("cosine", ours).

    Computed in float32 at least, whatever autocast says; memory does not grow with the window.

    Args:
        features: g (N, E, h, w).
        targets: int64 (N, h, w); 255 takes part in no pair.
        radius: Half the window's side.
        distance: Kind of affinity.
        label_pad: Target of pixels outside the image, whose features are 0. The precursor's zero padding makes them
            background; 255 leaves such pairs out.
        count_centre: Count each pixel as a pair with itself, as the precursor does.

    Raises:
        UsageError: Shapes that do not fit, or a radius below 1.
    """
    if features.ndim != 4 or targets.shape != (len(features), *features.shape[-2:]) or radius < 1:
        raise UsageError(
            f"features are {tuple(features.shape)}, targets {tuple(targets.shape)}, the radius {radius}; expected "
            "(N, E, h, w), (N, h, w), 1 or more"
        )
    with torch.autocast(features.device.type, enabled=False):
        maps = features.to(torch.promote_types(features.dtype, torch.float32))
        if distance == "cosine":
            maps = F.normalize(maps, dim=1, eps=1e-12)
        layout = _Layout.of(maps, radius)
        flat = layout.flatten(F.pad(targets, (radius,) * 4, value=label_pad)[:, None])[:, 0]
        score = _Consistency(layout, flat, distance, count_centre)
        total, parts = PairSums.apply(layout.flatten(F.pad(maps, (radius,) * 4)), score, distance, 3)
        centre = score.centre.to(parts)
        return ConsistencyLoss(
            total + (centre * parts.new_tensor(SHARES)).sum(), parts / parts.new_tensor(SHARES) + centre, score.counts
        )


def feature_smoothness_loss(
    features: Tensor, image: Tensor, kernels: tuple[Kernel, ...], radius: int, valid: Tensor | None = None
) -> Tensor:
    r"""The precursor's regulariser of deep features: alike where the image is alike.

    .. math:: L = \sum_{ij} v_i v_j K_{ij} mean_c |g_i - g_j| / \#\{(i, j): v_i v_j = 1\}

    Ordered pairs in the square window; the count includes each pixel with itself, as in A2GNN's released code.

    Args:
        features: g (N, E, h, w); alone gets a gradient.
        image: (N, 3, h, w).
        kernels: K, Gaussians over `xy` and `rgb` that add up.
        radius: Half the window's side.
        valid: v (N, h, w), bool; None is everywhere.

    Raises:
        UsageError: Shapes that do not fit.
    """
    if image.shape[-2:] != features.shape[-2:] or (valid is not None and valid.shape[-2:] != features.shape[-2:]):
        raise UsageError(f"features are {tuple(features.shape)} and the image {tuple(image.shape)}; expected one size")
    with torch.autocast(features.device.type, enabled=False):
        maps = features.to(torch.promote_types(features.dtype, torch.float32))
        layout = _Layout.of(maps, radius)
        inside = torch.ones_like(maps[:, 0], dtype=torch.bool) if valid is None else valid.bool()
        counted = layout.flatten(F.pad(inside, (radius,) * 4)[:, None])[:, 0]
        colour = layout.flatten(F.pad(image.detach().to(maps), (radius,) * 4))
        score = _Smoothness(layout, counted, colour, kernels)
        total, _ = PairSums.apply(layout.flatten(F.pad(maps, (radius,) * 4)), score, "l1", 1)
        smooth: Tensor = total / (score.count + inside.sum()).clamp(min=1)
        return smooth


@dataclass(frozen=True)
class _Layout:
    """Maps padded by the radius and flattened, so that an offset is one shift that never meets another row."""

    radius: int
    width: int
    inside: Tensor  # bool (rows,), False in the padding

    @classmethod
    def of(cls, maps: Tensor, radius: int) -> _Layout:
        inside = F.pad(torch.ones_like(maps[:, 0], dtype=torch.bool), (radius,) * 4)
        return cls(radius, inside.shape[-1], inside.flatten())

    @staticmethod
    def flatten(maps: Tensor) -> Tensor:
        """(N, E, H, W) to (N * H * W, E)."""
        return maps.movedim(1, -1).reshape(-1, maps.shape[1])

    def pairs(self, counted: Tensor) -> Iterator[Pairs]:
        """Pairs of counted rows of which at least one pixel is inside the image."""
        for dy, dx in half_window(self.radius):
            shift = dy * self.width + dx
            first = (
                (counted[:-shift] & counted[shift:] & (self.inside[:-shift] | self.inside[shift:])).nonzero().squeeze(1)
            )
            # An ordered pair has its centre inside; with both inside there are two.
            weight = self.inside[first].to(torch.float32) + self.inside[first + shift]
            yield Pairs(first, first + shift, weight, (dy, dx))


class _Consistency:
    def __init__(self, layout: _Layout, targets: Tensor, distance: Distance, count_centre: bool) -> None:
        self.layout, self.targets, self.distance = layout, targets, distance
        own = targets[layout.inside]
        background, labelled = (own == BACKGROUND).sum(), (own != IGNORE_INDEX).sum()
        centre = torch.stack([background, labelled - background, torch.zeros_like(background)]).double()
        if not count_centre:
            centre = torch.zeros_like(centre)
        counts = centre.clone()
        for pairs in self.pairs():
            counts += self._sets(pairs).double() @ pairs.weight.double()
        self.counts = counts + _EPSILON
        self.centre = -centre / self.counts * torch.log1p(torch.tensor(_EPSILON, dtype=torch.float64))

    def pairs(self) -> Iterator[Pairs]:
        return self.layout.pairs(self.targets != IGNORE_INDEX)

    def _sets(self, pairs: Pairs) -> Tensor:
        one, two = self.targets[pairs.first], self.targets[pairs.second]
        same = one == two
        background = one == BACKGROUND
        return torch.stack([same & background, same & ~background, ~same])

    def score(self, pairs: Pairs, distance: Tensor) -> tuple[Tensor, Tensor]:
        sets = self._sets(pairs)
        # 1 - a without cancellation where features are nearly alike.
        if self.distance == "l1":
            affinity, rest = torch.exp(-distance), -torch.expm1(-distance)
            slope = affinity
        else:
            affinity, rest = torch.sigmoid(-distance / _TEMPERATURE), torch.sigmoid(distance / _TEMPERATURE)
            slope = affinity * rest / _TEMPERATURE
        negative = sets[2]
        value = -torch.where(negative, rest + _EPSILON, affinity + _EPSILON).log()
        slope = torch.where(negative, -slope / (rest + _EPSILON), slope / (affinity + _EPSILON))
        shares = distance.new_tensor(SHARES) / self.counts.to(distance)
        weight = pairs.weight.to(distance) * (shares @ sets.to(distance))
        return (sets.to(distance) * (weight * value)).sum(1), weight * slope


class _Smoothness:
    def __init__(self, layout: _Layout, counted: Tensor, image: Tensor, kernels: tuple[Kernel, ...]) -> None:
        self.layout, self.counted, self.image, self.kernels = layout, counted, image, kernels
        self.count = image.new_zeros(())

    def pairs(self) -> Iterator[Pairs]:
        return self.layout.pairs(self.counted)

    def score(self, pairs: Pairs, distance: Tensor) -> tuple[Tensor, Tensor]:
        self.count += pairs.weight.sum().to(distance)
        colour = (self.image[pairs.first] - self.image[pairs.second]).square().sum(1)
        position = float(sum(step * step for step in pairs.offset))
        weight = torch.zeros_like(distance)
        for kernel in self.kernels:
            exponent = colour / kernel.sigmas["rgb"] ** 2 if "rgb" in kernel.sigmas else torch.zeros_like(colour)
            if XY in kernel.sigmas:
                exponent = exponent + position / kernel.sigmas[XY] ** 2
            weight += kernel.weight * torch.exp(-exponent / 2)
        weight *= pairs.weight.to(distance)
        return (weight * distance).sum()[None], weight
