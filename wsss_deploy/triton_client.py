"""Segment images on a Triton server that serves a model of `wsss-export --format triton`.

    from wsss_deploy.triton_client import TritonSegmenter

    segmenter = TritonSegmenter("localhost:8001", "pets")
    result = segmenter.predict("photo.jpg")

The card comes from the server. Only bytes of the resized image go there; the mask comes back where the server saw the
image at its own size, and the scores where it did not, since the mask is that of the enlarged scores. Where the card
cuts large images (`sizing.tile`), each window is a request and its scores come back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.card import ModelCard
from wsss_deploy.errors import BackendError
from wsss_deploy.images import ImageSource, load_image
from wsss_deploy.segmentation import Segmentation
from wsss_deploy.sizing import is_cut, resized
from wsss_deploy.tiling import ArrayWindows, Tiling, joined, predict_blocks


class TritonSegmenter:
    """A model on a Triton server, over gRPC; safe to use from many threads. Refines only where the served graph does.

    Args:
        url: Host and port of the server's gRPC endpoint.
        model: Name of the model there.
        timeout: Seconds that a request may take.

    Raises:
        BackendError: tritonclient is not installed, or the server does not answer or does not serve such a model.
        ArtifactError: The served card cannot be used.
    """

    def __init__(self, url: str, model: str, timeout: float = 30.0) -> None:
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise BackendError(
                f"a Triton client needs tritonclient ({error}); pip install 'wsss-deploy[triton]'"
            ) from error
        self._triton: Any = triton
        self._where = f"model '{model}' on {url}"
        self._model, self._timeout = model, timeout
        self._client = triton.InferenceServerClient(url)
        parameters = self._asked(lambda: self._client.get_model_config(model, client_timeout=timeout).config.parameters)
        if "wsss_card" not in parameters:
            raise BackendError(
                f"{self._where}: has no parameter 'wsss_card'; write it with wsss-export --format triton"
            )
        self._card = ModelCard.from_plain(parameters["wsss_card"].string_value, self._where)

    @property
    def card(self) -> ModelCard:
        """The served model's card."""
        return self._card

    def predict(self, image: ImageSource) -> Segmentation:
        """Segment one image.

        Args:
            image: Anything that `wsss_deploy.images.load_image` reads.

        Returns:
            The result. Where the server gave only the mask, it has no scores, and its confidence is 1; where the image
            was cut into windows, it has no scores.

        Raises:
            ImageError: The image cannot be used.
            BackendError: The server failed.
        """
        start = time.perf_counter()
        pixels, sizing = load_image(image), self._card.sizing
        if sizing.tile is not None and is_cut(pixels.shape[0], pixels.shape[1], self._card):
            sent = time.perf_counter()
            blocks = predict_blocks(self, ArrayWindows(pixels), Tiling(sizing.tile, sizing.overlap))
            mask, confidence = joined(blocks, *pixels.shape[:2])
            return Segmentation.from_mask(mask, confidence, pixels, self._card, _timing(start, sent))
        seen = resized(pixels, self._card)
        whole = seen.shape == pixels.shape
        sent = time.perf_counter()
        found = self._infer(seen, "mask" if whole else "scores")
        timing = _timing(start, sent)
        if whole:
            return Segmentation.from_mask(found, np.ones(found.shape, np.float32), pixels, self._card, timing)
        return Segmentation(found, pixels, self._card.classes, self._card.palette, timing)

    def scores_of(self, windows: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """As `wsss_deploy.tiling.WindowScorer`, one request for each window; BackendError if the server fails."""
        return np.stack([self._infer(window, "scores") for window in windows])

    def _infer(self, image: npt.NDArray[np.uint8], output: str) -> Any:
        """One output, without the batch's axis."""
        asked = self._triton.InferInput("image", [1, *image.shape], "UINT8")
        asked.set_data_from_numpy(image[None])
        outputs = [self._triton.InferRequestedOutput(output)]
        answer = self._asked(
            lambda: self._client.infer(self._model, [asked], outputs=outputs, client_timeout=self._timeout)
        )
        return answer.as_numpy(output)[0]

    def _asked(self, call: Any) -> Any:
        try:
            return call()
        except self._triton.InferenceServerException as error:
            reason = str(error).partition("\n")[0]
            raise BackendError(f"{self._where}: {reason}; check the server's address, log and model name") from error


def _timing(start: float, sent: float) -> dict[str, float]:
    inference = (time.perf_counter() - sent) * 1e3
    return {"pre": (sent - start) * 1e3, "inference": inference, "refinement": 0.0, "post": 0.0}
