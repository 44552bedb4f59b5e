"""Class activation maps as a model file of their own, so that they can be looked at where the model is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.cam.head import CamHead
from training.cam.prototypes import SharedFeatureHead
from training.cam.tokens import OddsHead
from wsss_deploy.artifact import save_model
from wsss_deploy.card import ModelCard
from wsss_deploy.networks.encoder import Encoder

_log = logging.getLogger(__name__)


def save_cams(path: Path, card: ModelCard, encoder: Encoder, head: nn.Module, depth: float) -> bool:
    """Write encoder and classifier as a model whose scores are class activation maps (decoder `cam`).

    One scale, no flip, no tags: what the classifier itself sees. The maps that pseudo-labels are made from are sums
    over scales; those of SFC are fused with prototypes, of which nothing is kept here. Maps of an `OddsHead` are
    log-odds against the background where these are positive.

    Args:
        path: Where to write.
        card: Of the segmenter; classes, palette, pre-processing and sizing are taken over.
        encoder: That the classifier works on.
        head: A `CamHead` or `SharedFeatureHead`.
        depth: Fraction of the encoder's depth whose map is meant, for a `CamHead`.

    Returns:
        Whether it was written; not if the map lies before the last stage of an encoder that cannot be cut there, nor
        of an `OddsHead` with more classes than channels. The log says why.
    """
    options: dict[str, Any] = dict(card.architecture.encoder_options)
    last = max(encoder.indices)
    if isinstance(head, OddsHead) and head.layers[1].out_channels > head.layers[1].in_channels:
        # Its bias would not fit into the norm's, see below.
        _log.warning("%s: not written, as there are more classes than channels of the encoder", path.name)
        return False
    decoder, index, tensors = _classifier(head, encoder, depth, last)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    if index != last:
        if not hasattr(encoder.model, "blocks") or len(set(encoder.reductions)) > 1:
            _log.warning("%s: not written, as this encoder cannot be cut behind the map of the classifier", path.name)
            return False
        options["depth"] = index + 1  # a plain ViT without the blocks behind the map
        behind = tuple(f"encoder.model.blocks.{number}." for number in range(index + 1, last + 1))
        state = {name: value for name, value in state.items() if not name.startswith(behind)}
    architecture = card.architecture.model_copy(update={"decoder": decoder, "encoder_options": options})
    maps = card.model_copy(
        update={"name": f"{card.name}-cams", "architecture": architecture, "refinement": None, "protocol": None}
    )
    save_model(path, maps, {**state, **{f"decoder.{name}": value for name, value in tensors.items()}})
    return True


def _classifier(head: nn.Module, encoder: Encoder, depth: float, last: int) -> tuple[str, int, dict[str, Tensor]]:
    if isinstance(head, SharedFeatureHead):
        return "cam-plain", last, {"classify.weight": head.classifier.weight}
    assert isinstance(head, CamHead)
    index = head.cam_index(encoder, depth)
    pair: Any = head.classify[head.indices.index(index)]
    normalise, classifier = pair
    # CAMs leave the norm's bias out as they do the classifier's. Odds do not: the classifier's bias is brought into the
    # norm's, whose file has no other place for it; with no more classes than channels it fits exactly.
    offset = torch.zeros_like(normalise.bias)
    if isinstance(head, OddsHead):
        kernel = classifier.weight.detach().flatten(1).double()
        offset = normalise.bias + (torch.linalg.pinv(kernel) @ classifier.bias.detach().double()).to(offset)
    tensors = {
        "normalise.weight": normalise.weight,
        "normalise.bias": offset,
        "classify.weight": classifier.weight,
    }
    return "cam", index, tensors
