"""From an uploaded file to everything that the page shows; knows nothing of gradio."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.colormap import colorize
from wsss_deploy.card import ModelCard
from wsss_deploy.drawing import draw_overlay
from wsss_deploy.errors import ImageError
from wsss_deploy.segmentation import Segmentation
from wsss_deploy.segmenter import Segmenter

#: Longer side, in pixels, of what is shown; the downloaded mask always has the image's own size.
SHOWN_SIDE = 1600
#: The same for the regions that answer to the pointer: there is one picture of each class.
REGIONS_SIDE = 800


@dataclass(frozen=True)
class Limits:
    """What one page accepts, so that visitors cannot exhaust the machine.

    Attributes:
        max_bytes: Size of an uploaded file.
        max_pixels: Pixels of an uploaded image; checked before it is decoded.
        concurrency: Images that are segmented at the same time.
        queue: Requests that may wait; further ones are refused with a message.
        sessions: Visitors whose last result is kept for the opacity slider.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 40_000_000
    concurrency: int = 1
    queue: int = 64
    sessions: int = 64


@dataclass(frozen=True)
class Shown:
    """What a visitor's session keeps, so that the overlay can be blended again without the model.

    Attributes:
        name: The upload's name without its suffix.
        image: uint8 (h, w, 3), at most `SHOWN_SIDE` pixels a side.
        mask: Class ids, uint8 (h, w).
        card: Of the model that gave the mask.
    """

    name: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    card: ModelCard

    def overlay(self, opacity: float) -> Image.Image:
        """The image tinted by class, RGB (h, w)."""
        return draw_overlay(self.image, self.mask, self.card.classes, self.card.palette, opacity)

    def regions(self) -> tuple[npt.NDArray[np.uint8], list[tuple[npt.NDArray[np.float64], str]]]:
        """The image and, for every class that occurs, where it is (h, w) and its name; at most `REGIONS_SIDE` long."""
        image, mask = Image.fromarray(self.image), Image.fromarray(self.mask)
        scale = min(1.0, REGIONS_SIDE / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        found = [((small == index).astype(np.float64), self.card.classes[index]) for index in np.unique(small)]
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR)), found


def uploaded_file(upload: object, folder: Path) -> Path:
    """The file that a browser's request means; nothing that the request says is trusted.

    Args:
        upload: What the request holds in place of the image: a dictionary with the `path` that the upload got.
        folder: Where uploads lie.

    Raises:
        ImageError: It is no file that was uploaded.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if isinstance(path, str) and "\0" not in path:
        file = Path(path).resolve()
        if file.is_relative_to(folder.resolve()) and file.is_file():
            return file
    raise ImageError("found no uploaded file, and nothing else is read; upload the image again")


def segment_upload(segmenter: Segmenter, path: Path, limits: Limits) -> Segmentation:
    """Segment an uploaded file.

    Args:
        segmenter: The model.
        path: The file on the server; only its name appears in messages.
        limits: What is accepted.

    Raises:
        ImageError: The file is too large or no image that can be used.
    """
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise ImageError(
            f"{path.name}: {size / 2**20:.1f} MB, this page accepts at most {limits.max_bytes / 2**20:.0f} MB; "
            "save it smaller or with more compression"
        )
    file = io.BytesIO(path.read_bytes())
    _check_pixels(file, path.name, limits.max_pixels)
    file.name = path.name  # what the errors of reading call it, instead of a path on the server
    return segmenter.predict(file)


def _check_pixels(file: io.BytesIO, name: str, limit: int) -> None:
    """Refuse by the header alone, before the pixels take memory."""
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Exception:  # no image, damaged or a bomb: reading it says which
        return
    finally:
        file.seek(0)
    if width * height > limit:
        raise ImageError(
            f"{name}: {width} × {height} is {width * height / 1e6:.0f} megapixels, this page accepts at most "
            f"{limit / 1e6:.0f}; scale it down"
        )


def shown(result: Segmentation, name: str, card: ModelCard) -> Shown:
    """Reduce a result to what the session keeps.

    Args:
        result: The model's result.
        name: The upload's name without its suffix.
        card: The model's.
    """
    size = _shown_size(result)
    image = Image.fromarray(result.image)
    mask = Image.fromarray(result.mask)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return Shown(name, np.asarray(image), np.asarray(mask), card)


def coco_text(result: Segmentation, name: str) -> str:
    """The result as a COCO file of one image: a JSON object with `images`, `categories` and `annotations`.

    Args:
        result: The model's result.
        name: `file_name` of the image.
    """
    height, width = result.mask.shape
    content = {
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "categories": [{"id": index, "name": each} for index, each in enumerate(result.classes)],
        "annotations": result.to_coco(image_id=1),
    }
    return json.dumps(content, ensure_ascii=False)


def confidence_image(result: Segmentation) -> Image.Image:
    """The confidence as colours, RGB, at most `SHOWN_SIDE` pixels a side."""
    confidence = Image.fromarray(result.confidence)
    size = _shown_size(result)
    if confidence.size != size:
        confidence = confidence.resize(size, Image.Resampling.BILINEAR)
    return colorize(np.asarray(confidence))


def _shown_size(result: Segmentation) -> tuple[int, int]:
    height, width = result.mask.shape
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))
