"""From an image's bytes to the operator's guide, in numpy and in torch (also while a graph is traced).

Every channel is a sum of whole numbers, which float32 holds exactly, times one constant. So pixels of one colour have
bit by bit the same guide, wherever they lie and whatever computes it: par and varm divide by a neighbourhood's
deviation, in which the rounding of, say, CIELAB would turn a flat patch into noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Guide = Literal["rgb", "opponent"]
Array = TypeVar("Array", "NDArray[Any]", "torch.Tensor")


def make_guide(images: Array, kind: Guide) -> Array:
    """The operator's guide.

    Args:
        images: RGB uint8 (N, H, W, 3), numpy or torch.
        kind: "rgb", in [0, 1]; or "opponent": brightness (r + g + b) / 3 in [0, 1], red against green r - g and
            yellow against blue (r + g) / 2 - b in [-1, 1].

    Returns:
        float32 (N, 3, H, W), contiguous, on the device of the images.
    """
    if isinstance(images, np.ndarray):
        return _numpy_guide(images, kind)
    planes = images.permute(0, 3, 1, 2).float().contiguous()
    if kind == "rgb":
        return planes * (1 / 255)
    import torch

    red, green, blue = planes.unbind(1)
    both = red + green
    return torch.stack([(both + blue) * (1 / 765), (red - green) * (1 / 255), (both - 2 * blue) * (1 / 510)], 1)


def opponent_guide(image: torch.Tensor) -> torch.Tensor:
    """The guide "opponent" of an image in floating point, for training, where it is no longer one of whole bytes.

    Args:
        image: RGB in [0, 1], (N, 3, H, W).

    Returns:
        (N, 3, H, W); see `make_guide`.
    """
    import torch

    red, green, blue = image.unbind(1)
    return torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)


def _numpy_guide(images: NDArray[Any], kind: Guide) -> NDArray[np.float32]:
    guide = np.empty((images.shape[0], 3, *images.shape[1:3]), np.float32)
    if kind == "rgb":
        np.multiply(images.transpose(0, 3, 1, 2), np.float32(1 / 255), out=guide)
        return guide
    red, green, blue = images.astype(np.int16).transpose(3, 0, 1, 2)
    both = red + green
    np.multiply(both + blue, np.float32(1 / 765), out=guide[:, 0])
    np.multiply(red - green, np.float32(1 / 255), out=guide[:, 1])
    np.multiply(both - 2 * blue, np.float32(1 / 510), out=guide[:, 2])
    return guide
