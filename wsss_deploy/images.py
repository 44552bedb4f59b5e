"""Every accepted input becomes one thing: an RGB image, uint8 (H, W, 3), upright.

Files, bytes, file objects and PIL images
    The orientation in EXIF is applied. The first frame of an animation is taken. Colour profiles are ignored.
    Transparency is composed over white, as most viewers show it. CMYK, YCbCr and HSV are converted by Pillow.
    16-bit greys are divided by 257, so that 65535 becomes 255. Mode I counts as 8-bit when no value exceeds 255, as
    16-bit up to 65535. Mode F is taken as [0, 1], or as [0, 255] when a value exceeds 1.
Arrays
    (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16 (divided by 257) or float in [0, 1].
Torch tensors
    (H, W), (1, H, W), (3, H, W) or (4, H, W) of the same types, on any device.

Anything else is an `ImageError` that says what was found, what was expected and what to do.
"""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from wsss_deploy.errors import ImageError

logger = logging.getLogger(__name__)

#: Largest image in pixels; the size from which Pillow itself, with its default settings, refuses a file.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
#: Orientations whose upright image has its sides swapped.
_TURNED = (5, 6, 7, 8)
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@runtime_checkable
class TensorLike(Protocol):
    """What is needed of a torch tensor, so that torch need not be imported."""

    shape: Any

    def detach(self) -> Any:
        """The tensor without its gradient."""
        ...

    def cpu(self) -> Any:
        """The tensor in host memory."""
        ...

    def is_floating_point(self) -> bool:
        """Whether its numbers are floating point."""
        ...


ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any] | BinaryIO | TensorLike
)


def load_image(source: ImageSource) -> npt.NDArray[np.uint8]:
    """Read any accepted image; the module's text lists what is accepted and how it is converted.

    Args:
        source: Path, encoded bytes, open binary file, PIL image, array or torch tensor. Never modified.

    Returns:
        RGB, uint8 (H, W, 3), contiguous, upright.

    Raises:
        ImageError: The source is no image that can be used; the message names it and the remedy.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if isinstance(source, Image.Image):
        return _from_pil(source, f"PIL image of mode {source.mode}")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(bytes(source)), "image bytes")
    if isinstance(source, str | os.PathLike):
        return _from_path(source)
    if isinstance(source, TensorLike):
        return _from_tensor(source)
    if hasattr(source, "read"):
        content = source.read()
        name = str(getattr(source, "name", "file object"))
        if not isinstance(content, bytes):
            raise ImageError(f"{name}: opened as text, expected bytes; open it with mode 'rb'")
        return _decode(io.BytesIO(content), name)
    raise ImageError(
        f"found {type(source).__name__}, expected a path, bytes, binary file, PIL image, numpy array or torch tensor"
    )


def _from_path(source: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    name = os.fspath(source)
    if str(name).startswith(("http://", "https://")):
        raise ImageError(f"{name}: addresses are not fetched; download the image and pass the file")
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{name}: is a folder, expected an image file; pass the files inside it")
        if not path.is_file():
            raise ImageError(f"{name}: no such image file; check the path")
        with path.open("rb") as file:
            return _decode(file, str(name))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: cannot be opened ({reason}); check the path and its permissions") from error


def _decode(file: BinaryIO, name: str) -> npt.NDArray[np.uint8]:
    if file.seek(0, os.SEEK_END) == 0:
        raise ImageError(f"{name}: is empty (0 bytes), expected an image; restore or remove it")
    file.seek(0)
    try:
        with Image.open(file) as image:
            _check_size(image.height, image.width, name)
            image.load()
            return _from_pil(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: too many pixels, more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million; scale it down "
            "or cut it into parts (in Python, PIL.Image.MAX_IMAGE_PIXELS sets the limit)"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is not an image in a known format; save it as PNG or JPEG") from error
    except MemoryError as error:
        raise ImageError(f"{name}: does not fit into memory; scale it down or cut it into parts") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise ImageError(f"{name}: is damaged or cut short ({error}); copy or save it again") from error


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: has no pixels (height {height}, width {width}); pass an image of at least 1 x 1")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width} x {height} is {height * width / 1e6:.0f} megapixels, the limit is "
            f"{MAX_PIXELS / 1e6:.0f}; scale it down or cut it into parts"
        )


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image as `load_image` gives it, upright, from the file's header only.

    Args:
        path: The file.

    Raises:
        ImageError: It cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            (width, height), orientation = image.size, _orientation(image, str(path))
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise ImageError(f"{path}: cannot be read as an image ({error}); save it again as PNG or JPEG") from error
    return (width, height) if orientation in _TURNED else (height, width)


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:  # a damaged EXIF block must not cost the picture; viewers show it as stored
        logger.warning("%s: its EXIF data cannot be read (%s); taken as upright", name, error)
        return 1


def _from_pil(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    _check_size(image.height, image.width, name)
    orientation = _orientation(image, name)
    if orientation in _ORIENTATIONS:
        # `transpose` keeps the mode and the values; converting comes after it.
        image = image.transpose(_ORIENTATIONS[orientation])
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name)
    if image.mode in ("I", "F"):
        return _from_array(_wide_range(np.asarray(image), image.mode, name), name)
    try:
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"{name}: mode {image.mode} cannot be converted to RGB; save it as RGB") from error


def _wide_range(values: npt.NDArray[Any], mode: str, name: str) -> npt.NDArray[Any]:
    """Bring the open-ended modes I and F to uint8, uint16 or [0, 1] by the values that are there."""
    low, high = float(values.min()), float(values.max())
    limit = 65535 if mode == "I" else 255
    if not (low >= 0 and high <= limit):  # also true for NaN
        raise ImageError(
            f"{name}: mode {mode} with values from {low:g} to {high:g}, expected 0 to {limit}; "
            "scale and save it as 8-bit"
        )
    if mode == "I":
        return values.astype(np.uint8 if high <= 255 else np.uint16)
    return values if high <= 1 else values / np.float32(255)


def _from_array(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    shape = array.shape
    if array.ndim == 4:
        raise ImageError(f"{name} of shape {shape}: found a batch, expected one image; use predict_batch(list(images))")
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        remedy = "pass (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            remedy = "channels come last: pass array.transpose(1, 2, 0)"
        raise ImageError(f"{name} of shape {shape}: found no image layout, expected (H, W, 3); {remedy}")
    _check_size(shape[0], shape[1], name)
    values = _to_8bit(array, name)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.shape[2] == 4:
        return _from_pil(Image.fromarray(np.ascontiguousarray(values), mode="RGBA"), name)
    if values.shape[2] == 1:
        return np.repeat(values, 3, axis=2)
    return np.array(values, order="C")  # a copy: the result never shares memory with the caller's array


def _to_8bit(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # nearest
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name} of dtype {array.dtype}: found values from {low:g} to {high:g}, expected [0, 1]; "
                "pass uint8, or divide by 255; the model normalises by itself"
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    raise ImageError(
        f"{name} of dtype {array.dtype}: expected uint8, uint16 or float in [0, 1]; convert with array.astype(np.uint8)"
    )


def _from_tensor(tensor: TensorLike) -> npt.NDArray[np.uint8]:
    shape = tuple(int(side) for side in tensor.shape)
    if len(shape) == 4:
        raise ImageError(f"tensor of shape {shape}: found a batch, expected one image; use predict_batch(list(images))")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3, 4)):
        remedy = "pass (3, H, W)"
        if len(shape) == 3 and shape[2] in (1, 3, 4):
            remedy = "channels come first in tensors: pass tensor.permute(2, 0, 1)"
        raise ImageError(f"tensor of shape {shape}: found no image layout, expected (3, H, W); {remedy}")
    host = tensor.detach().cpu()
    # numpy has no bfloat16; float32 holds every 16-bit float exactly.
    array: npt.NDArray[Any] = (host.float() if tensor.is_floating_point() else host).numpy()
    return _from_array(array if array.ndim == 2 else array.transpose(1, 2, 0), "tensor")
