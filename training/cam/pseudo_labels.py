"""CAMs of whole images, and a data set whose masks are pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.cam.labels import LabelRule, presence, refined_labels
from training.data.dataset import Color, DataSource, WrappedSource
from wsss_deploy.card import Preprocessing, palette_bytes
from wsss_deploy.errors import DataError
from wsss_deploy.files import atomic_write


def network_image(image: NDArray[np.uint8], long_side: int, preprocessing: Preprocessing) -> Tensor:
    """A whole image as the network takes it.

    Args:
        image: uint8 (H, W, 3).
        long_side: Pixels of the longer side; both sides are rounded to the stride.
        preprocessing: Normalisation and stride.

    Returns:
        Normalised (1, 3, h, w).
    """
    stride = preprocessing.stride
    scale = long_side / max(image.shape[:2])
    size = [max(stride, round(side * scale / stride) * stride) for side in image.shape[:2]]
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    small = F.interpolate(tensor, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (small - mean) / std


def pseudo_label(
    image: NDArray[np.uint8],
    cams: Tensor,
    tags: Sequence[int],
    rule: LabelRule,
    make: Callable[[Tensor, Tensor, Tensor, Tensor, LabelRule], Tensor] = refined_labels,
) -> NDArray[np.uint8]:
    """Labels of a whole image at its own size.

    Args:
        image: uint8 (H, W, 3).
        cams: (1, K, h, w) in [0, 1]; class id k + 1 is channel k.
        tags: Class ids that are in the image.
        rule: Thresholds and refiner.
        make: `refined_labels`, or `sure_labels` for maps that know the background.

    Returns:
        uint8 (H, W), 255 = ignore.
    """
    size = image.shape[:2]
    guide = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    raised = F.interpolate(cams.float(), size=size, mode="bilinear", align_corners=False)
    labels = make(guide, raised, presence(tags, cams.shape[1]), torch.ones(1, *size, dtype=torch.bool), rule)
    return labels[0].numpy().astype(np.uint8)


def write_label(path: Path, labels: NDArray[np.uint8], palette: Sequence[Color]) -> None:
    """A label map as a palette PNG, atomically."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette_bytes(palette))
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=False)


class PseudoLabelSource(WrappedSource):
    """`source`, where the images of one folder of label maps have these as their masks, and no image has others.

    Args:
        source: The data set.
        folder: Holds NAME.png.
    """

    def __init__(self, source: DataSource, folder: Path) -> None:
        super().__init__(source)
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where an image's labels are, or would be."""
        return self._folder / f"{name}.png"

    def kinds(self, name: str) -> frozenset[str]:
        """Masks where there are pseudo-labels, tags where the data set has them; nothing else."""
        own = self._source.kinds(name) & {"tags"}
        return own | {"masks"} if self.path(name).is_file() else own

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """The pseudo-labels.

        Raises:
            DataError: There are none, or the file cannot be read.
        """
        path = self.path(name)
        if kind != "masks" or not path.is_file():
            raise DataError(f"{self.name}: '{name}' has no pseudo-label {kind}; there are masks of {path.name} at most")
        try:
            with Image.open(path) as picture:
                return np.asarray(picture, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"{path.name}: the pseudo-label cannot be read; delete it and --resume") from error
