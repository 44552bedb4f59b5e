"""What a network that is being trained sees: read from the state that its run saves every few seconds."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from wsss_deploy.card import Architecture, ModelCard, Sizing, default_palette
from wsss_deploy.errors import WsssError

if TYPE_CHECKING:
    from wsss_deploy.segmenter import Segmenter

SIDE = 480


@dataclass(frozen=True)
class Preview:
    """A prediction in the middle of a training.

    Attributes:
        picture: The overlay, at most `SIDE` pixels a side.
        iteration: Steps that the network had taken.
    """

    picture: Image.Image
    iteration: int


class Previews:
    """The newest prediction of each run; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[Path, tuple[tuple[float, Path], Preview]] = {}

    def show(self, run: Path, image: Path, classes: tuple[str, ...]) -> Preview | None:
        """The prediction for an image, made anew when the run has saved another state.

        Args:
            run: The run's folder.
            image: What to segment.
            classes: Class names by id.

        Returns:
            None where there is nothing to be shown: no state yet, or torch is not installed here.
        """
        state = run / "checkpoint.pt"
        try:
            key = (state.stat().st_mtime, image)
            with self._lock:
                known = self._newest.get(run)
                if known is None or known[0] != key:
                    known = self._newest[run] = key, _predict(state, image, classes)
                return known[1]
        except (OSError, WsssError, ImportError):
            return None


def _predict(state: Path, image: Path, classes: tuple[str, ...]) -> Preview:
    segmenter, iteration = _open(state, classes)
    picture = segmenter.predict(image).overlay()
    picture.thumbnail((SIDE, SIDE))
    return Preview(picture, iteration)


def _open(state: Path, classes: tuple[str, ...]) -> tuple[Segmenter, int]:
    import torch

    from wsss_deploy.networks import build_network, encoder_preprocessing
    from wsss_deploy.segmenter import Segmenter

    content: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
    recipe = content["recipe"]
    model = recipe["model"]
    architecture = Architecture(
        encoder=model["encoder"],
        decoder=model["decoder"],
        decoder_width=model["decoder_width"],
        encoder_options=model["encoder_options"],
    )
    network = build_network(architecture, len(classes)).eval()
    # The moving average, where one is kept, is what the run will deliver.
    values, prefix = (
        (content["average"], "module.") if content["average"] is not None else (content["module"], "network.")
    )
    network.load_state_dict(
        {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    )
    card = ModelCard(
        name="preview",
        classes=classes,
        palette=default_palette(len(classes)),
        architecture=architecture,
        preprocessing=encoder_preprocessing(model["encoder"], model["encoder_options"]),
        sizing=Sizing(long_side=recipe["inference_long_side"] or recipe["augmentation"]["size"]),
    )
    return Segmenter.from_network(network, card), int(content["iteration"])
