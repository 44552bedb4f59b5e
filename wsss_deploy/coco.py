"""COCO's form of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def run_lengths(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Uncompressed run lengths along the columns, beginning with the number of pixels outside (may be 0).

    Args:
        mask: Bool (H, W).
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    borders = np.concatenate(([0], changes, [flat.size]))
    runs: list[int] = np.diff(borders).tolist()
    return [0, *runs] if flat[0] else runs


def annotation(
    mask: npt.NDArray[np.bool_], annotation_id: int, image_id: int, category_id: int, score: float
) -> dict[str, Any]:
    """One COCO annotation.

    Args:
        mask: Bool (H, W), not empty.
        annotation_id: Its `id`.
        image_id: Its `image_id`.
        category_id: Its `category_id`.
        score: Confidence in [0, 1].
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "iscrowd": 0,
        "score": score,
    }
