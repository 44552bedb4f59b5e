"""Two results on one image against each other, and one result before and after its refinement; no gradio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import PairwiseParameters
from wsss_deploy.refinement import DEFAULT, STRONG, Refiner
from wsss_deploy.segmentation import Segmentation

#: How far the refinement looks, in pixels of the network's image, by what the page calls it.
REACHES = {"near": (1, 2, 4), "middle": (1, 2, 4, 8), "far": (2, 4, 8, 16)}
_DIFFERENCE_COLOR = (255, 0, 200)


@dataclass(frozen=True)
class Agreement:
    """How far two results agree.

    Attributes:
        share: Pixels with classes of the same name, of all.
        classes: Class name and intersection over union of the two results, for every class that one of them shows.
        differs: bool (H, W), where they do not agree.
    """

    share: float
    classes: tuple[tuple[str, float], ...]
    differs: npt.NDArray[np.bool_]


def compare(first: Segmentation, second: Segmentation) -> Agreement:
    """Compare two results on the same image; classes are the same if their names are.

    Args:
        first: One of them.
        second: The other, with a mask of the same size.
    """
    names = tuple(dict.fromkeys((*first.classes, *second.classes)))
    masks = [np.asarray([names.index(name) for name in result.classes])[result.mask] for result in (first, second)]
    same = masks[0] == masks[1]
    rows = []
    for index, name in enumerate(names):
        inside = [mask == index for mask in masks]
        union = int((inside[0] | inside[1]).sum())
        if union:
            rows.append((name, float((inside[0] & inside[1]).sum() / union)))
    return Agreement(float(same.mean()), tuple(rows), ~same)


def difference_image(image: npt.NDArray[np.uint8], differs: npt.NDArray[np.bool_], side: int) -> Image.Image:
    """The image in grey, with the pixels that differ in one loud colour.

    Args:
        image: uint8 (H, W, 3).
        differs: bool (H, W).
        side: Longer side of the result, at most.
    """
    grey = Image.fromarray(image).convert("L").convert("RGB")
    loud = Image.composite(Image.new("RGB", grey.size, _DIFFERENCE_COLOR), grey, Image.fromarray(differs))
    loud.thumbnail((side, side), Image.Resampling.BILINEAR)
    return loud


def refinement_of(iterations: int, sharpness: float, reach: str) -> Refinement:
    """The refinement that the page's controls mean.

    Args:
        iterations: 0 to 30; outside values are brought inside.
        sharpness: How strongly colour edges stop it, 0.25 to 4; 1 is the published value.
        reach: A key of `REACHES`; others mean the middle.
    """
    bandwidth = STRONG.parameters.contrast / min(max(float(sharpness), 0.25), 4.0)
    parameters = PairwiseParameters(
        kind="par",
        dilations=REACHES.get(reach, REACHES["middle"]),
        iterations=min(max(int(iterations), 0), 30),
        bandwidth=bandwidth,
        normalise=True,
    )
    return Refinement(parameters=parameters, guide="opponent")


def controls_of(settings: Refinement | None) -> tuple[int, float, str]:
    """Where the page's controls stand for a refinement, or as near to it as they come.

    Args:
        settings: A model's own; None takes what `refine=True` means.

    Returns:
        Iterations, sharpness and reach, as for `refinement_of`.
    """
    parameters = (settings or DEFAULT).parameters
    reach = min(REACHES, key=lambda name: abs(max(REACHES[name]) - parameters.reach))
    sharpness = STRONG.parameters.contrast / parameters.contrast
    return min(parameters.iterations, 30), round(min(max(sharpness, 0.25), 4.0), 2), reach


@dataclass(frozen=True)
class Unrefined:
    """What a visitor's session keeps to refine again without the network.

    Attributes:
        name: The upload's name without its suffix.
        scores: float32 (C, h, w), as the network gave them.
        image: uint8 (H, W, 3), what the result is drawn on.
        small: uint8 (h, w, 3), what the network saw.
        card: The model's.
        cams: float32 (C, h, w), class activation maps of the classifier that taught the model; None if there are none.
    """

    name: str
    scores: npt.NDArray[np.float32]
    image: npt.NDArray[np.uint8]
    small: npt.NDArray[np.uint8]
    card: ModelCard
    cams: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, result: Segmentation, card: ModelCard, name: str, side: int) -> Unrefined:
        """Keep a result that was made without refinement; the image is kept at most `side` pixels long.

        Raises:
            UsageError: It was tiled and has no scores.
        """
        if result.network_scores is None:
            raise UsageError(
                "this model cuts such an image into tiles and keeps no scores to explain; try a smaller one"
            )
        image = Image.fromarray(result.image)
        height, width = result.network_scores.shape[1:]
        small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
        return cls(name, result.network_scores, np.asarray(image), small, card)

    def result(self, settings: Refinement | None) -> Segmentation:
        """The result with a refinement, or without any."""
        scores = self.scores
        if settings is not None and settings.parameters.iterations:
            small: npt.NDArray[Any] = self.small[None]
            scores = Refiner(settings, threads=1)(scores[None], small)[0]
        return Segmentation(scores, self.image, self.card.classes, self.card.palette, {})


def changed_share(before: Segmentation, after: Segmentation) -> float:
    """Part of the pixels whose class changed."""
    return float((before.mask != after.mask).mean())
