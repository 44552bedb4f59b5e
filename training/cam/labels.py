"""From CAMs to labels: thresholds, background scores, refinement along the image.

CAMs here have no background channel: (N, K, H, W) in [0, 1], channel k belongs to class id k + 1. Thresholds are the
background's score: where no present class scores higher, the label is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_deploy.card import IGNORE_INDEX, Preprocessing
from wsss_deploy.pairwise import PairwiseParameters, refine
from wsss_deploy.pairwise.guides import Guide, opponent_guide


def presence(tags: Sequence[int], classes: int) -> Tensor:
    """Which classes an image's tags name.

    Args:
        tags: Class ids, without the background's.
        classes: Foreground classes K.

    Returns:
        float32 (1, K), 1 where present.
    """
    present = torch.zeros(1, classes)
    present[0, [tag - 1 for tag in tags]] = 1
    return present


def present_cams(cams: Tensor, tags: Tensor) -> Tensor:
    """CAMs of the classes that the tags name; all others 0.

    Args:
        cams: (N, K, H, W).
        tags: (N, K); 1 where the class is in the image, anything else (0, NaN) where it is not.
    """
    return cams * (tags == 1).to(cams.dtype)[:, :, None, None]


def plain_labels(cams: Tensor, threshold: float) -> Tensor:
    """The best class where it scores above the threshold, background elsewhere.

    Args:
        cams: Of present classes (N, K, H, W).
        threshold: The background's score.

    Returns:
        int64 (N, H, W). Images without a present class are all background.
    """
    value, index = cams.max(dim=1)
    return torch.where(value > threshold, index + 1, 0)


def band_labels(cams: Tensor, high: float, low: float, valid: Tensor) -> Tensor:
    """The best class above `high`, background up to `low`, 255 between them and outside the image.

    Args:
        cams: Of present classes (N, K, H, W).
        high: Above it a class is sure.
        low: Up to it the background is sure.
        valid: bool (N, H, W).

    Returns:
        int64 (N, H, W).
    """
    value, index = cams.max(dim=1)
    labels = torch.where(value > high, index + 1, IGNORE_INDEX)
    labels = torch.where(value <= low, 0, labels)
    return labels.masked_fill(~valid, IGNORE_INDEX)


def byte_image(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The image as the refiners see it: de-normalised, truncated to whole grey levels, divided by 255.

    Args:
        image: Normalised (N, 3, H, W).
        preprocessing: Its normalisation.

    Returns:
        (N, 3, H, W) in [0, 1]. The release wraps values outside [0, 255] around; here they are clamped.
    """
    mean, std = (
        torch.tensor(v, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
        for v in (preprocessing.mean, preprocessing.std)
    )
    levels = (image * (std * 255) + mean * 255).clamp(0, 255)
    # A whole grey level may come back from the normalisation a rounding error too low.
    return (levels + 1e-3).floor() / 255


_VARM = PairwiseParameters(kind="varm")


@dataclass(frozen=True)
class LabelRule:
    """How CAMs become training labels.

    Attributes:
        high: Background score of the strict pass: what is foreground there is foreground.
        low: Background score of the loose pass: what is background in both is background; the rest is 255.
        refiner: PAR or VARM; None thresholds without refinement.
        stride: Refinement at 1/stride of the image's size; the release has 2.
        temperature: Divides scores before the softmax over present classes; the release has 1.
        sure: Least probability of a label in `sure_labels`, which has no part in `high`, `low` and `temperature`.
        guide: What the refiner sees: the image as it is, as released, or brightness and opponent colours.
    """

    high: float = 0.55
    low: float = 0.35
    refiner: PairwiseParameters | None = _VARM
    stride: int = 2
    temperature: float = 1.0
    sure: float = 0.6
    guide: Guide = "rgb"


def refined_labels(image: Tensor, cams: Tensor, tags: Tensor, valid: Tensor, rule: LabelRule) -> Tensor:
    """Training labels of AFA and TSCD: two background scores, refined side by side, agreed on.

    All images of a batch and both background scores go through the refiner in one call; absent classes take no part
    (neither in its softmax nor in its time, beyond padding to the image with the most classes).

    Args:
        image: In [0, 1] (N, 3, H, W), see `byte_image`.
        cams: (N, K, H, W) in [0, 1].
        tags: (N, K), 1 where present, NaN where unknown.
        valid: bool (N, H, W).
        rule: Thresholds and refiner.

    Returns:
        int64 (N, H, W), 255 = ignore. An image without a tag is all background inside `valid`; where any of its tags
        is unknown it has no background, which a class that nobody named may cover.
    """
    scores, classes = _scores_by_slot(cams, tags, rule)
    slots = classes.shape[1]
    if rule.refiner is not None:
        scores = refine(scores.contiguous(), guide_of(image, rule).to(scores.dtype), rule.refiner)
    high, low = (
        classes.gather(1, _resized(part, image.shape[-2:]).argmax(dim=1).flatten(1)).reshape(valid.shape)
        for part in torch.split(scores, slots, dim=1)
    )
    return agreed_labels(high, low, tags, valid)


def agreed_labels(high: Tensor, low: Tensor, tags: Tensor, valid: Tensor) -> Tensor:
    """Foreground of the strict pass, background of both; 255 elsewhere, and as `refined_labels` says.

    Args:
        high: Class ids of the strict pass (N, H, W).
        low: Of the loose one.
        tags: (N, K).
        valid: bool (N, H, W).
    """
    labels = torch.where(high != 0, high, torch.where(low == 0, 0, IGNORE_INDEX))
    return _known(labels, tags).masked_fill(~valid, IGNORE_INDEX)


def sure_labels(image: Tensor, maps: Tensor, tags: Tensor, valid: Tensor, rule: LabelRule) -> Tensor:
    """Training labels from maps that are probabilities: refined, and kept where one of them is sure.

    Args:
        image: In [0, 1] (N, 3, H, W), see `byte_image`.
        maps: Of present classes (N, K, H, W), at least 0; what their sum lacks to 1 is the background's.
        tags: (N, K), 1 where present, NaN where unknown.
        valid: bool (N, H, W).
        rule: `sure`, `stride` and refiner.

    Returns:
        int64 (N, H, W), 255 = ignore; images without or with unknown tags as in `refined_labels`.
    """
    own, classes, _ = _present(maps, tags)
    background = (1 - own.sum(dim=1, keepdim=True)).clamp(min=0)
    scores = _resized(torch.cat([background, own], dim=1), _small(image, rule))
    if rule.refiner is not None:
        scores = refine(scores.contiguous(), guide_of(image, rule).to(scores.dtype), rule.refiner)
    scores = _resized(scores, image.shape[-2:])
    value, slot = (scores / scores.sum(dim=1, keepdim=True)).max(dim=1)
    labels = _known(classes.gather(1, slot.flatten(1)).reshape(valid.shape), tags)
    return labels.where((value >= rule.sure) & valid, IGNORE_INDEX)


def _known(labels: Tensor, tags: Tensor) -> Tensor:
    unknown = tags.isnan().any(dim=1)[:, None, None]
    return labels.masked_fill(unknown & (labels == 0), IGNORE_INDEX)


def _present(cams: Tensor, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of each image's own classes (N, slots, H, W), 0 where it has fewer; classes (N, 1 + slots); which are used.

    Slot 0 of the classes is the background.
    """
    present = tags == 1
    slots = int(present.sum(dim=1).max()) if present.numel() else 0
    order = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    used = present.gather(1, order)
    own = cams.gather(1, order[:, :, None, None].expand(-1, -1, *cams.shape[-2:]))
    classes = F.pad(torch.where(used, order + 1, 0), (1, 0))
    return own * used[:, :, None, None], classes, used


def _scores_by_slot(cams: Tensor, tags: Tensor, rule: LabelRule) -> tuple[Tensor, Tensor]:
    """Softmaxed scores (N, 2 slots, h, w) for both background scores, and the class of each slot (N, slots).

    Slot 0 is the background, the others the image's own classes; slots an image has no use for score 0.
    """
    own, classes, used = _present(cams, tags)
    parts = []
    for background in (rule.high, rule.low):
        stacked = torch.cat([torch.full_like(cams[:, :1], background), own], dim=1)
        small = _resized(stacked, _small(cams, rule))
        absent = F.pad(~used, (1, 0))[:, :, None, None]
        parts.append((small / rule.temperature).masked_fill(absent, -torch.inf).softmax(dim=1))
    return torch.cat(parts, dim=1), classes


def guide_of(image: Tensor, rule: LabelRule) -> Tensor:
    """What the rule's refiner sees of an image (N, 3, H, W), at 1/stride of its size."""
    small = _resized(image, _small(image, rule))
    return (opponent_guide(small) if rule.guide == "opponent" else small).contiguous()


def _small(maps: Tensor, rule: LabelRule) -> tuple[int, int]:
    # An image may be a single row.
    return max(1, maps.shape[-2] // rule.stride), max(1, maps.shape[-1] // rule.stride)


def _resized(maps: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
