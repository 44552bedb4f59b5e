"""Refinement of a network's scores along the image: which one applies to a model, and running it.

It runs at the size at which the network sees the image, on the scores as the runtime gives them: numpy arrays from
ONNX Runtime (the compiled operator reads its output buffer, nothing is copied, torch is not needed), tensors from
torch on their own device; runtimes on a GPU do it where their scores are (`backends.device_refinement`). The
scores then go to the image's size as they would without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ValidationError

from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.errors import UsageError
from wsss_deploy.pairwise import Form, PairwiseParameters, refine
from wsss_deploy.pairwise.api import Storage
from wsss_deploy.pairwise.guides import make_guide

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Array = TypeVar("Array", "NDArray[Any]", "torch.Tensor")
Asked = bool | PairwiseParameters | Refinement | None

#: What `refine=True` means for a model whose card names no refinement: helps, or at least does not harm, wherever it
#: was measured (docs/pairwise.md).
DEFAULT = Refinement(
    parameters=PairwiseParameters(kind="par", dilations=(1, 2, 4, 8), iterations=5, normalise=True), guide="opponent"
)
#: Twice as much on photographs of large objects, harmful where structures are thin. Training chooses between the two,
#: or none, on the model's own validation images.
STRONG = Refinement(
    parameters=PairwiseParameters(kind="par", dilations=(2, 4, 8, 16), iterations=8, normalise=True), guide="opponent"
)


_COMPACT_CLASSES = 64


@dataclass(frozen=True)
class Choice:
    """What was decided for a model.

    Attributes:
        settings: The refinement; None where nothing is refined.
        reason: Who decided it.
        in_graph: It is part of the model's graph and runs with it.
    """

    settings: Refinement | None
    reason: str
    in_graph: bool = False

    def refiner(self, threads: int | None = None) -> Refiner | None:
        """What has to be applied to the model's scores; None if nothing has.

        Args:
            threads: CPU threads; None as in `wsss_deploy.pairwise.refine`.
        """
        return None if self.settings is None or self.in_graph else Refiner(self.settings, threads)

    def describe(self, form_of: Callable[[Refinement], Form]) -> dict[str, Any]:
        """What runs and why, as plain data.

        Args:
            form_of: The runtime's `refinement_form`.
        """
        if self.settings is None:
            return {"form": "none", "reason": self.reason}
        told = {
            "reason": self.reason,
            "summary": str(self.settings),
            "guide": self.settings.guide,
            "parameters": json.loads(self.settings.parameters.to_json()),
        }
        if self.in_graph:
            return {"form": "graph", "form_reason": "exported with the network; its time is in inference", **told}
        form = form_of(self.settings)
        return {"form": form.name, "form_reason": form.reason, **told}


class Refiner:
    """A refinement that is ready to be applied; safe to call from many threads.

    Args:
        settings: Operator and guide.
        threads: CPU threads; None as in `wsss_deploy.pairwise.refine`.

    Attributes:
        settings: As given.
    """

    def __init__(self, settings: Refinement, threads: int | None = None) -> None:
        self.settings = settings
        self._threads = threads

    def __call__(self, scores: Array, images: Array) -> Array:
        """Refine scores.

        Args:
            scores: float32 (N, C, H, W), numpy or torch; left as they are.
            images: What the network saw, RGB uint8 (N, H, W, 3), of the same library and on the same device.

        Returns:
            (N, C, H, W). Where a Gaussian affinity finds no neighbour alike, the scores stay the network's. Up to 64
            classes are refined in 16-bit storage where the compiled form has it (`wsss_deploy.pairwise.refine`), which
            changes a score by about 1e-4; their sum stays 1 to within 1e-3.
        """
        parameters = self.settings.parameters
        guide = make_guide(images, self.settings.guide)
        # Of very many classes the small ones would add up to something that 16 bits lose.
        storage: Storage = "compact" if scores.shape[1] <= _COMPACT_CLASSES else "full"
        refined = refine(scores, guide, parameters, threads=self._threads, storage=storage)
        return keep_lone(refined, scores, parameters)


def keep_lone(refined: Array, scores: Array, parameters: PairwiseParameters) -> Array:
    """The scores of pixels whose Gaussian weights are all 0 (`par` and `varm` have none): refining leaves them nothing.

    Args:
        refined: (N, C, H, W).
        scores: The same before refining.
        parameters: The operator's.

    Returns:
        (N, C, H, W).
    """
    if parameters.kind != "gaussian" or parameters.mean_field is not None:
        return refined
    if isinstance(refined, np.ndarray):
        return np.where(refined.sum(1, keepdims=True) < 0.5, scores, refined)
    return scores.where(refined.sum(1, keepdim=True) < 0.5, refined)


def decide(asked: Asked, card: ModelCard, in_graph: bool) -> Choice:
    """Settle what is refined and how.

    Args:
        asked: None leaves it to the card; False turns it off; True takes the card's refinement or, where it has none,
            `DEFAULT`; parameters (with the guide "rgb") or a whole refinement are taken as they are.
        card: The model's card.
        in_graph: Whether the scores come from the graph that the card speaks of, not from a network in memory.

    Raises:
        UsageError: The model's graph refines by itself and something else is asked for; or the parameters do not
            keep scores probabilities.
    """
    own = card.refinement
    if in_graph and own is not None and own.in_graph:
        if asked is None or asked is True:
            return Choice(own, "part of the model's graph", in_graph=True)
        raise UsageError(
            "this model refines inside its graph, which can be neither turned off nor changed; leave the refinement "
            "to it, or use a model.onnx of 'wsss-export --refine none'"
        )
    if isinstance(asked, PairwiseParameters | Refinement):
        return Choice(_checked(asked), "asked for")
    if asked is False:
        return Choice(None, "turned off")
    if asked is True:
        return Choice(own or DEFAULT, f"asked for, with the parameters of the {'card' if own else 'package'}")
    if own is None:
        return Choice(None, "the card names no refinement")
    return Choice(own, "on in the card") if own.enabled else Choice(None, "off in the card")


def _checked(asked: PairwiseParameters | Refinement) -> Refinement:
    if isinstance(asked, Refinement):
        return asked
    try:
        return Refinement(parameters=asked)
    except ValidationError as error:
        raise UsageError("; ".join(item["msg"] for item in error.errors())) from error
