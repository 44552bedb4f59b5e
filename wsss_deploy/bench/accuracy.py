"""mIoU of a model on a folder of images with masks, without the training package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import DataError
from wsss_deploy.segmenter import Segmenter


def find_pairs(data: Path, split: str, most: int | None = None) -> list[tuple[Path, Path]]:
    """Images and their masks: `images/NAME.*`, `masks/NAME.png`, names (or file names) by line in `splits/SPLIT.txt`.

    Args:
        data: The folder.
        split: Name of the split.
        most: At most this many, spread evenly over the split; None takes all.

    Raises:
        DataError: The folder is laid out differently, or the split is empty or names something without image or mask.
    """
    listing = data / "splits" / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{data}: has no {listing.relative_to(data)}; expected images/, masks/ and splits/{split}.txt")
    images = {name: path for path in sorted((data / "images").glob("*")) for name in (path.stem, path.name)}
    names = [name for line in listing.read_text(encoding="utf-8-sig").splitlines() if (name := line.strip())]
    masks = {name: data / "masks" / f"{images[name].stem}.png" for name in names if name in images}
    missing = [name for name in names if name not in masks or not masks[name].is_file()]
    if missing or not names:
        found = (
            f"{len(missing)} of {len(names)} names have no image or no mask (first: '{missing[0]}')" if missing else ""
        )
        raise DataError(
            f"{data}: split '{split}': {found or 'names no image'}; expected images/NAME.* and masks/NAME.png for each "
            f"line of {listing.relative_to(data)}: add them, or pass a split with masks"
        )
    pairs = [(images[name], masks[name]) for name in names]
    if most is None or most >= len(pairs):
        return pairs
    return [pairs[index * len(pairs) // most] for index in range(most)]


def mean_iou(segmenter: Segmenter, pairs: list[tuple[Path, Path]]) -> float:
    """Mean over the classes that are labelled or predicted of the IoU over all pixels, at the images' size.

    Args:
        segmenter: The model.
        pairs: Images and their masks; 255 is not counted.

    Raises:
        DataError: A mask has another size than its image or holds an unknown class.
    """
    count = len(segmenter.card.classes)
    confusion = np.zeros((count, count), np.int64)
    for image, mask in pairs:
        with Image.open(mask) as opened:
            truth = np.asarray(opened)
        confusion += _confusion(segmenter.predict(image).mask, truth, count, str(mask))
    both = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - both
    return float((both[either > 0] / either[either > 0]).mean())


def _confusion(
    predicted: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], count: int, name: str
) -> npt.NDArray[np.int64]:
    if truth.shape != predicted.shape:
        raise DataError(f"{name}: is {truth.shape}, its image {predicted.shape} (height, width); expected equal")
    counted = truth != IGNORE_INDEX
    ids = truth[counted].astype(np.int64)
    if ids.size and ids.max() >= count:
        raise DataError(f"{name}: holds class id {ids.max()}, expected 0 to {count - 1} or {IGNORE_INDEX}")
    return np.bincount(ids * count + predicted[counted], minlength=count * count).reshape(count, count)
