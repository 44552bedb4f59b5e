"""From an image's bytes to the operator's guide, in numpy and in torch (also while a graph is traced)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Guide = Literal["rgb", "lab"]
Array = TypeVar("Array", "NDArray[Any]", "torch.Tensor")

# sRGB (IEC 61966-2-1): the light of each of the 256 values.
_VALUES = np.arange(256) / 255
LIGHT = np.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4).astype(np.float32)
# To CIE XYZ, in units of the white point D65.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
TO_XYZ = (_XYZ / np.array([[0.95047], [1.0], [1.08883]])).astype(np.float32)
# L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)), b = 200 (f(Y) - f(Z)), in units of 100.
TO_LAB = np.array([[0, 1.16, 0], [5, -5, 0], [0, 2, -2]], np.float32)
_BLACK = np.array([[0.16], [0], [0]], np.float32)
_KNEE, _SLOPE, _START = (6 / 29) ** 3, 841 / 108, 4 / 29


def make_guide(images: Array, kind: Guide) -> Array:
    """The operator's guide.

    Args:
        images: RGB uint8 (N, H, W, 3), numpy or torch.
        kind: "rgb", the image in [0, 1]; or "lab", CIELAB under D65 in units of 100: L in [0, 1], a and b about
            within [-1, 1].

    Returns:
        float32 (N, 3, H, W), contiguous, on the device of the images.
    """
    if isinstance(images, np.ndarray):
        return _numpy_lab(images) if kind == "lab" else _numpy_rgb(images)
    return _torch_lab(images) if kind == "lab" else images.permute(0, 3, 1, 2).float().mul(1 / 255).contiguous()


def _numpy_rgb(images: NDArray[Any]) -> NDArray[np.float32]:
    rgb: NDArray[np.float32] = np.multiply(
        images.transpose(0, 3, 1, 2), np.float32(1 / 255), dtype=np.float32, order="C"
    )
    return rgb


def _numpy_lab(images: NDArray[Any]) -> NDArray[np.float32]:
    count, height, width, _ = images.shape
    light = LIGHT[np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(count, 3, -1)]
    xyz = TO_XYZ @ light
    curve = np.power(xyz, np.float32(1 / 3))
    np.copyto(curve, xyz * np.float32(_SLOPE) + np.float32(_START), where=xyz <= _KNEE)
    lab: NDArray[np.float32] = TO_LAB @ curve
    lab -= _BLACK
    return lab.reshape(count, 3, height, width)


def _torch_lab(images: torch.Tensor) -> torch.Tensor:
    import torch

    def constant(values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(values).to(images.device)

    light = constant(LIGHT)[images.long()].permute(0, 3, 1, 2)
    # The two matrices as 1 x 1 convolutions: any height and width in a traced graph.
    xyz = torch.nn.functional.conv2d(light, constant(TO_XYZ)[:, :, None, None])
    curve = torch.where(xyz > _KNEE, xyz.clamp_min(_KNEE).pow(1 / 3), xyz * _SLOPE + _START)
    return torch.nn.functional.conv2d(curve, constant(TO_LAB)[:, :, None, None], -constant(_BLACK)[:, 0]).contiguous()
