"""Which refinement a trained model carries: the one that helps most on its own validation images, or none.

Objects with long borders gain from a wide reach, thin structures lose by it (docs/pairwise.md), so the choice is the
data's and not ours. The figures that led to it go into the card beside the unrefined ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from training.evaluate import EvaluationResult, Evaluator
from wsss_deploy import Segmenter
from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.refinement import DEFAULT, STRONG, Refiner
from wsss_deploy.upsampling import best_class

if TYPE_CHECKING:
    from training.data.dataset import DataSource
    from wsss_deploy.networks import SegmentationNetwork

_log = logging.getLogger(__name__)

CANDIDATES = (DEFAULT, STRONG)
#: What a refinement has to add to the mIoU; less is noise.
LEAST_GAIN = 0.001


@dataclass(frozen=True)
class RefinementChoice:
    """What was compared and what won.

    Attributes:
        refinement: The winner; None where none helps.
        plain: Figures without refinement.
        refined: Figures of every candidate, in their order.
    """

    refinement: Refinement | None
    plain: EvaluationResult
    refined: tuple[EvaluationResult, ...]

    @property
    def best(self) -> EvaluationResult:
        """Figures of the winner."""
        return self.plain if self.refinement is None else self.refined[CANDIDATES.index(self.refinement)]

    def metrics(self) -> dict[str, float]:
        """Figures of the winner by their names in the card's protocol; empty where nothing is refined."""
        if self.refinement is None:
            return {}
        return {"val_refined_miou": self.best.miou, "val_refined_boundary_miou": self.best.mean_boundary_iou}

    def to_plain(self) -> dict[str, Any]:
        """Figures of all candidates, and the winner, as plain data."""
        results = {"none": self.plain, **dict(zip(map(str, CANDIDATES), self.refined, strict=True))}
        return {
            "chosen": "none" if self.refinement is None else str(self.refinement),
            "candidates": {
                name: {"miou": result.miou, "mean_boundary_iou": result.mean_boundary_iou}
                for name, result in results.items()
            },
        }


def choose_refinement(
    network: SegmentationNetwork, card: ModelCard, source: DataSource, names: Sequence[str], device: str = "cpu"
) -> RefinementChoice:
    """Run the network once over images with masks and compare its scores with their refined forms.

    A candidate wins with the highest mIoU at native size, if it adds `LEAST_GAIN` and costs no boundary IoU.

    Args:
        network: The trained network.
        card: Its card.
        source: The data set.
        names: Images with masks.
        device: Where the network runs.

    Raises:
        DataError: A mask is unusable, or there are no images.
    """
    segmenter = Segmenter.from_network(network, card, device=device, refine=False)
    refiners = [Refiner(candidate) for candidate in CANDIDATES]
    plain, *refined = (Evaluator(source.classes) for _ in range(1 + len(CANDIDATES)))
    for name in names:
        truth = source.load_labels(name, "masks")
        result = segmenter.predict(source.load_image(name))
        plain.update(result.mask, truth)
        scores, image = result.network_scores, result.image
        assert scores is not None, "the card of a training asks for no tiles"
        height, width = scores.shape[1:]
        seen = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        for refiner, evaluator in zip(refiners, refined, strict=True):
            sharper = refiner(scores[None], seen[None])[0]
            evaluator.update(best_class(sharper, *truth.shape)[0], truth)
    before = plain.result()
    after = tuple(evaluator.result() for evaluator in refined)
    best = max(range(len(after)), key=lambda index: after[index].miou)
    helps = after[best].miou >= before.miou + LEAST_GAIN and after[best].mean_boundary_iou >= before.mean_boundary_iou
    _log.info(
        "Refinement on %d validation images: mIoU %.4f without, %s; taken: %s",
        len(names),
        before.miou,
        ", ".join(f"{result.miou:.4f} with {candidate}" for candidate, result in zip(CANDIDATES, after, strict=True)),
        CANDIDATES[best] if helps else "none",
    )
    return RefinementChoice(CANDIDATES[best] if helps else None, before, after)
