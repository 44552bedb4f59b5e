"""What a network that is being trained sees: read from the state that its run saves every few seconds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from wsss_deploy.card import Architecture, Color, ModelCard, Sizing
from wsss_deploy.errors import ImageError, WsssError

if TYPE_CHECKING:
    from wsss_deploy.segmenter import Segmenter

SIDE = 480


@dataclass(frozen=True)
class Preview:
    """A prediction in the middle of a training.

    Attributes:
        picture: The overlay, at most `SIDE` pixels a side.
        iteration: Steps that the network had taken.
        name: Of the image.
    """

    picture: Image.Image
    iteration: int
    name: str


class Previews:
    """The newest prediction of each run; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[Path, tuple[tuple[float, Path], Preview]] = {}
        self._unreadable: set[Path] = set()

    def show(
        self, run: Path, images: Sequence[Path], classes: tuple[str, ...], palette: tuple[Color, ...]
    ) -> Preview | None:
        """The prediction for the first image that can be read, made anew when the run has saved another state.

        Args:
            run: The run's folder.
            images: What to segment one of.
            classes: Class names by id.
            palette: Their colours.

        Returns:
            None where there is nothing to be shown: no state yet, no readable image, or torch is not installed
            here.
        """
        state = run / "checkpoint.pt"
        try:
            saved = state.stat().st_mtime
            with self._lock:
                images = [image for image in images if image not in self._unreadable]
                known = self._newest.get(run)
                if not images:
                    return None
                if known is not None and known[0] == (saved, images[0]):
                    return known[1]
                return self._predict(run, images, *_open(state, classes, palette), saved)
        except (OSError, WsssError, ImportError):
            return None

    def _predict(
        self, run: Path, images: Sequence[Path], segmenter: Segmenter, iteration: int, saved: float
    ) -> Preview | None:
        for image in images:
            try:
                picture = segmenter.predict(image).overlay()
            except ImageError:
                self._unreadable.add(image)
                continue
            picture.thumbnail((SIDE, SIDE))
            preview = Preview(picture, iteration, image.stem)
            self._newest[run] = (saved, image), preview
            return preview
        return None


def _open(state: Path, classes: tuple[str, ...], palette: tuple[Color, ...]) -> tuple[Segmenter, int]:
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
        palette=palette,
        architecture=architecture,
        preprocessing=encoder_preprocessing(model["encoder"], model["encoder_options"]),
        sizing=Sizing(long_side=recipe["inference_long_side"] or recipe["augmentation"]["size"]),
    )
    return Segmenter.from_network(network, card), int(content["iteration"])
