"""Evaluation: per-class IoU, mIoU, boundary IoU and the confusion matrix, on whole images at native size.

Confusion matrices come from torchmetrics (255 ignored). The mean runs over the classes that occur in the ground
truth or in a prediction; a class with neither has no IoU. Boundary IoU follows Cheng et al., "Boundary IoU"
(CVPR 2021), accumulated over the data set per class: the IoU of the two masks' bands of pixels closer to the mask's
contour than 2 % of the image diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt
from torchmetrics.classification import MulticlassConfusionMatrix

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError

if TYPE_CHECKING:
    from training.data.dataset import DataSource
    from wsss_deploy import Segmenter

BOUNDARY_FRACTION = 0.02


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of one model on one split.

    Attributes:
        classes: Class names, K of them.
        iou: IoU per class in [0, 1]; NaN for a class that is neither labelled nor predicted.
        boundary_iou: The same for the boundary bands.
        dice: Dice coefficient per class.
        confusion: (K, K) pixel counts, rows ground truth, columns prediction.
        images: Number of images.
        protocol: How the figures came about.
    """

    classes: tuple[str, ...]
    iou: tuple[float, ...]
    boundary_iou: tuple[float, ...]
    dice: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    images: int
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that have one."""
        return _mean(self.iou)

    @property
    def mean_boundary_iou(self) -> float:
        """Mean boundary IoU over the classes that have one."""
        return _mean(self.boundary_iou)

    @property
    def foreground_miou(self) -> float:
        """Mean IoU without class 0 (of use where class 0 is a background that fills the image)."""
        return _mean(self.iou[1:])

    @property
    def foreground_dice(self) -> float:
        """Mean Dice without class 0."""
        return _mean(self.dice[1:])

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready dictionary; a missing IoU is null."""
        plain = asdict(self)
        for key in ("iou", "boundary_iou", "dice"):
            plain[key] = {
                name: None if np.isnan(value) else value for name, value in zip(self.classes, plain[key], strict=True)
            }
        return plain | {
            "miou": self.miou,
            "mean_boundary_iou": self.mean_boundary_iou,
            "foreground_miou": self.foreground_miou,
            "foreground_dice": self.foreground_dice,
        }

    def table(self) -> str:
        """Per-class figures as text, last a line `mIoU 0.xxxx`."""
        width = max(len(name) for name in self.classes)
        lines = [f"{'class':<{width}}  {'IoU':>7}  {'boundary':>8}  {'Dice':>7}"]
        for row in zip(self.classes, self.iou, self.boundary_iou, self.dice, strict=True):
            lines.append(f"{row[0]:<{width}}  {row[1]:7.4f}  {row[2]:8.4f}  {row[3]:7.4f}")
        lines.append("protocol: " + ", ".join(f"{key}={value}" for key, value in self.protocol.items()))
        lines.append(f"boundary mIoU {self.mean_boundary_iou:.4f}")
        lines.append(f"foreground mIoU {self.foreground_miou:.4f}, foreground Dice {self.foreground_dice:.4f}")
        lines.append(f"mIoU {self.miou:.4f}")
        return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")


class Evaluator:
    """Collects predictions one image at a time.

    Args:
        classes: Class names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        count = len(self.classes)
        self._confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORE_INDEX, validate_args=False)
        self._total = np.zeros((count, count), dtype=np.int64)
        self._boundary = np.zeros((2, count), dtype=np.int64)
        self._images = 0

    def update(self, prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Add one image.

        Args:
            prediction: (H, W) class ids below K.
            truth: (H, W) class ids, 255 = ignored.

        Raises:
            DataError: The sizes differ or an id is out of range.
        """
        count = len(self.classes)
        if prediction.shape != truth.shape:
            raise DataError(
                f"prediction is {prediction.shape}, ground truth {truth.shape} (height, width); expected equal"
            )
        bad = truth[(truth >= count) & (truth != IGNORE_INDEX)]
        if bad.size:
            raise DataError(f"ground truth holds class id {int(bad[0])}, expected 0..{count - 1} or {IGNORE_INDEX}")
        matrix = self._confusion(
            torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
        )
        self._confusion.reset()
        self._total += matrix.numpy().astype(np.int64)
        self._add_boundaries(prediction, truth)
        self._images += 1

    def _add_boundaries(self, prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        valid = truth != IGNORE_INDEX
        distance = max(1, round(BOUNDARY_FRACTION * float(np.hypot(*truth.shape))))
        for index in np.union1d(np.unique(prediction), np.unique(truth[valid])):
            ours = boundary_band(prediction == index, distance) & valid
            theirs = boundary_band(truth == index, distance) & valid
            self._boundary[0, index] += np.count_nonzero(ours & theirs)
            self._boundary[1, index] += np.count_nonzero(ours | theirs)

    def result(self, protocol: Mapping[str, Any] | None = None) -> EvaluationResult:
        """The figures of all images so far.

        Raises:
            DataError: No image was added.
        """
        if not self._images:
            raise DataError("no image with a mask was evaluated; check the split's name and its masks")
        hit = np.diag(self._total).astype(np.float64)
        truth, predicted = self._total.sum(1), self._total.sum(0)
        with np.errstate(invalid="ignore"):
            iou = hit / (truth + predicted - hit)
            dice = 2 * hit / (truth + predicted)
            boundary = self._boundary[0] / self._boundary[1]
        return EvaluationResult(
            classes=self.classes,
            iou=tuple(iou.tolist()),
            boundary_iou=tuple(boundary.tolist()),
            dice=tuple(dice.tolist()),
            confusion=tuple(tuple(row) for row in self._total.tolist()),
            images=self._images,
            protocol=dict(protocol or {}),
        )


def boundary_band(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """The pixels of a mask that lie within `distance` (chessboard) of its contour; the image border counts as contour.

    Args:
        mask: (H, W).
        distance: Pixels, at least 1.
    """
    depth: NDArray[np.int32] = distance_transform_cdt(np.pad(mask, 1), metric="chessboard")[1:-1, 1:-1]
    return mask & (depth <= distance)


def evaluate(
    segmenter: Segmenter,
    source: DataSource,
    names: Sequence[str],
    split: str,
    on_image: Callable[[int], object] | None = None,
) -> EvaluationResult:
    """Run a model over images and compare with their masks at native size: one scale, no flip, no CRF, no tags.

    Whether the scores are refined is the segmenter's matter; the protocol says it.

    Args:
        segmenter: Any artifact.
        source: The data set; its classes must be the model's.
        names: Images with masks.
        split: Named in the protocol.
        on_image: Called with the number of images done.

    Raises:
        DataError: The classes differ or a mask is unusable.
    """
    if tuple(segmenter.card.classes) != tuple(source.classes):
        raise DataError(
            f"the model's classes ({', '.join(segmenter.card.classes)}) are not the data set's "
            f"({', '.join(source.classes)}); evaluate on a data set with the same classes.txt"
        )
    evaluator = Evaluator(source.classes)
    for done, name in enumerate(names, start=1):
        mask = segmenter.predict(source.load_image(name)).mask
        try:
            evaluator.update(mask, source.load_labels(name, "masks"))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        if on_image is not None:
            on_image(done)
    sizing, runtime = segmenter.card.sizing, segmenter.describe()
    protocol = {
        "data": source.name,
        "split": split,
        "images": len(names),
        "resolution": f"long side {sizing.long_side} px" if sizing.long_side and not sizing.tile else "native",
        "scales": 1,
        "flip": False,
        "crf": False,
        "refinement": runtime["refinement"].get("summary", "none"),
        "tags_at_test": False,
        "scored_at": "native size",
        "runtime": runtime["backend"],
    }
    return evaluator.result(protocol)
