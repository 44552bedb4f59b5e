"""The result of segmenting one image."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from wsss_deploy.card import ModelCard, palette_bytes
from wsss_deploy.errors import BackendError, ImageError, UsageError
from wsss_deploy.files import atomic_write
from wsss_deploy.images import ImageSource, load_image
from wsss_deploy.upsampling import best_class, upsample

if TYPE_CHECKING:
    import supervision

#: Written into every PNG as its `Software`, so that our own files can be told from the user's.
SOFTWARE = "wsss-deploy"


class ClassShare(NamedTuple):
    """A class that occurs in a result.

    Attributes:
        id: Class id, the value in the mask.
        name: Class name.
        color: RGB, 0 to 255.
        share: Part of the image's area, in (0, 1].
        confidence: Mean confidence over that area, in [0, 1].
    """

    id: int
    name: str
    color: tuple[int, int, int]
    share: float
    confidence: float


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The result of segmenting one image; made by `Segmenter`.

    Attributes:
        network_scores: Class probabilities at the network's size, refined if that is on, float32 (C, h, w); None for
            a tiled prediction, which does not keep them.
        image: The segmented image, upright, uint8 (H, W, 3).
        classes: Class names by id.
        palette: RGB by class id.
        timing: Milliseconds by stage: `pre` (reading, orienting, resizing), `inference`, `refinement` (0 where the
            model's graph refines), `post` (scores to mask). In a batch, `inference` and `refinement` are the batch's
            time divided by its images.
        mask: Class ids, uint8 (H, W): exactly the image's size.
        confidence: The winning class's score, float32 (H, W).
    """

    network_scores: npt.NDArray[np.float32] | None
    image: npt.NDArray[np.uint8]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    timing: Mapping[str, float]
    mask: npt.NDArray[np.uint8] = field(init=False)
    confidence: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        if self.network_scores is None:  # `from_mask` sets them
            return
        mask, confidence = best_class(self.network_scores, *self.image.shape[:2])
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "confidence", confidence)

    @classmethod
    def from_mask(
        cls,
        mask: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
        image: npt.NDArray[np.uint8],
        card: ModelCard,
        timing: Mapping[str, float],
    ) -> Self:
        """A result of which only the mask and the confidence are kept; arguments as in the class."""
        result = cls(None, image, card.classes, card.palette, timing)
        object.__setattr__(result, "mask", mask)
        object.__setattr__(result, "confidence", confidence)
        return result

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Class probabilities at the image's size, float32 (C, H, W).

        Computed at every access and not kept, since it is large: hold it in a variable if it is needed twice.
        `mask` is its `argmax(0)` and `confidence` its `max(0)`.

        Raises:
            UsageError: The prediction was tiled; all classes' scores of a large image are not kept.
        """
        if self.network_scores is None:
            raise UsageError("a tiled prediction keeps mask and confidence, not the scores; predict it without tiles")
        return upsample(self.network_scores, *self.mask.shape)

    def legend(self) -> list[ClassShare]:
        """The classes that occur, the largest first."""
        count = len(self.classes)
        areas = np.bincount(self.mask.ravel(), minlength=count)
        sums = np.zeros(count)
        for row, values in zip(self.mask, self.confidence, strict=True):  # by rows: no float64 copy of the whole
            sums += np.bincount(row, values, minlength=count)
        entries = [
            ClassShare(
                id=index,
                name=self.classes[index],
                color=self.palette[index],
                share=float(areas[index] / self.mask.size),
                confidence=float(sums[index] / areas[index]),
            )
            for index in np.flatnonzero(areas).tolist()
        ]
        return sorted(entries, key=lambda entry: -entry.share)

    def mask_image(self) -> Image.Image:
        """The mask as a palette image: pixel values are class ids, colours the classes'."""
        image = Image.fromarray(self.mask)
        image.putpalette(palette_bytes(self.palette))
        return image

    def overlay(self, image: ImageSource | None = None, opacity: float = 0.5) -> Image.Image:
        """The image tinted with the classes' colours, with a thin outline around every region.

        A class named "background" stays clear.

        Args:
            image: What to draw on, of the mask's size; None takes the segmented image.
            opacity: Of the tint, from 0 (outlines only) to 1.

        Returns:
            An RGB image of the mask's size.

        Raises:
            ImageError: The image has another size, or `opacity` is outside [0, 1].
        """
        from wsss_deploy.drawing import draw_overlay

        base = self.image if image is None else load_image(image)
        return draw_overlay(base, self.mask, self.classes, self.palette, opacity)

    def save(self, path: str | os.PathLike[str], opacity: float = 0.5) -> tuple[Path, ...]:
        """Write the result; every file is written whole or not at all.

        Args:
            path: A name ending in `.png` for the mask alone (palette PNG, pixel values are class ids), or a folder for
                `mask.png`, `overlay.png` and `segmentation.json` (classes, shares, timing).
            opacity: Of the overlay's tint.

        Returns:
            The files that were written.

        Raises:
            ImageError: The name ends in another suffix; masks need a lossless format that keeps ids.
            WsssError: A file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() == ".png" and not target.is_dir():
            write_png(target, self.mask_image())
            return (target,)
        if target.suffix and not target.is_dir():
            raise ImageError(f"{target}: masks are saved as PNG, found '{target.suffix}'; pass a .png name or a folder")
        files = (target / "mask.png", target / "overlay.png", target / "segmentation.json")
        write_png(files[0], self.mask_image())
        write_png(files[1], self.overlay(opacity=opacity))
        with atomic_write(files[2]) as file:
            file.write((json.dumps(self.summary(), indent=2) + "\n").encode())
        return files

    def summary(self) -> dict[str, Any]:
        """Size, classes with their shares, and timing as plain data."""
        height, width = self.mask.shape
        return {
            "width": width,
            "height": height,
            "classes": [entry._asdict() for entry in self.legend()],
            "timing_ms": {stage: round(value, 3) for stage, value in self.timing.items()},
        }

    def to_coco(self, image_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations: one for every class that occurs, with uncompressed run lengths.

        `category_id` is the class id. `counts` are runs along the columns, beginning with the pixels outside; `bbox` is
        [x, y, width, height] in pixels, `area` in pixels, `score` the mean confidence. As in COCO-Stuff, a
        class is one annotation of run lengths with `iscrowd` 0, however many pieces its region has.

        Args:
            image_id: `image_id` of the annotations.
            first_id: `id` of the first one; the others count up.
        """
        from wsss_deploy.coco import annotation

        return [
            annotation(self.mask == entry.id, first_id + index, image_id, entry.id, entry.confidence)
            for index, entry in enumerate(self.legend())
        ]

    def to_supervision(self) -> supervision.Detections:
        """Detections of the library supervision: one mask for every class that occurs.

        Raises:
            BackendError: The library is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise BackendError(
                "to_supervision() needs the library supervision, which is not installed; "
                "pip install 'wsss-deploy[supervision]'"
            ) from error
        legend = self.legend()
        masks = np.stack([self.mask == entry.id for entry in legend])
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
            mask=masks,
            confidence=np.array([entry.confidence for entry in legend], np.float32),
            class_id=np.array([entry.id for entry in legend]),
            data={"class_name": np.array([entry.name for entry in legend])},
        )

    def __repr__(self) -> str:
        height, width = self.mask.shape
        shares = ", ".join(f"{entry.name} {entry.share:.1%}" for entry in self.legend())
        return f"Segmentation({width} x {height}: {shares})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay."""
        buffer = io.BytesIO()
        self.overlay().save(buffer, format="PNG")
        return buffer.getvalue()


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically and mark it as ours.

    Raises:
        WsssError: It cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=info)
