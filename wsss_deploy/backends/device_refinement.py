"""Refinement where a runtime left its scores: on the GPU, without torch, in the runtime's own stream.

Image and scores are on the device already, so nothing but the refined scores has to leave it. **Not run yet on a
GPU**: what is tested is the kernels' code and the order of launches, by a stand-in for the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from wsss_deploy.backends.base import memory_is_short
from wsss_deploy.backends.device_layer import Buffers, DeviceLayer
from wsss_deploy.card import Refinement
from wsss_deploy.pairwise import Form, choose, refine
from wsss_deploy.pairwise.cuda_form import refine_at
from wsss_deploy.pairwise.cuda_guide import make_guide_at
from wsss_deploy.pairwise.cuda_launch import Place
from wsss_deploy.pairwise.forms import MOST_NEIGHBOURS
from wsss_deploy.pairwise.guides import make_guide

_log = logging.getLogger(__name__)


class DeviceRefinement:
    """Refines in one stream, with buffers that are kept; for one thread at a time, in which the device is active.

    Args:
        layer: The device.
        place: Its number, the stream's handle and the compute capability.
        stream: Of the layer; refinement follows what is in it.
        obstacles: What was found by `obstacle`, shared by all that work on one device.
    """

    def __init__(self, layer: DeviceLayer, place: Place, stream: object, obstacles: dict[str, str | None]) -> None:
        self._layer, self._place, self._stream, self._obstacles = layer, place, stream, obstacles
        self._buffers = Buffers(layer)
        self._warned = False

    def release(self) -> None:
        """Give the buffers back."""
        self._buffers.release()

    def __call__(self, settings: Refinement, images: int, scores: int, shape: tuple[int, ...]) -> int:
        """Put a refinement into the stream.

        Args:
            settings: One that `obstacle` has nothing against.
            images: Address of what the network saw, RGB bytes (N, H, W, 3).
            scores: Address of float32 (N, C, H, W); overwritten, but only after all memory was there.
            shape: Of the scores.

        Returns:
            Address of the refined scores, which the next call overwrites.

        Raises:
            BackendError: The kernels cannot be compiled or launched, or memory is short.
        """
        batch, channels, height, width = shape
        plane = 4 * batch * height * width
        guide = self._buffers.device("guide", 3 * plane)
        weights = self._buffers.device("weights", len(settings.parameters.offsets) * plane)
        spare = self._buffers.device("spare", channels * plane)
        make_guide_at(self._place, settings.guide, images, (batch, height, width), guide)
        whole = batch, channels, height, width
        return refine_at(self._place, settings.parameters, whole, (3, guide), scores, weights, spare)

    def timed(
        self, settings: Refinement, images: int, scores: int, shape: tuple[int, ...]
    ) -> tuple[int, Callable[[], float]] | None:
        """Put a refinement into the stream as a call does, between two marks.

        Returns:
            The address, and a function that tells the milliseconds that refining took, once the stream has been waited
            for. None if memory is short: the scores then are as they were.

        Raises:
            BackendError: As a call.
        """
        start = self._layer.mark(self._stream)
        try:
            found = self(settings, images, scores, shape)
        except Exception as error:
            if not memory_is_short(error):
                raise
            self._without_memory(error)
            return None
        end = self._layer.mark(self._stream)
        return found, lambda: self._layer.milliseconds(start, end)

    def obstacle(self, settings: Refinement) -> str | None:
        """Why a refinement cannot be done here; None if it can: a small one then equals the CPU's on this device."""
        parameters = settings.parameters
        if parameters.kind == "gaussian" or parameters.mean_field is not None:
            return "Gaussian weights and mean fields are refined on the CPU"
        if len(parameters.offsets) > MOST_NEIGHBOURS:
            return f"{len(parameters.offsets)} neighbours, of which it takes at most {MOST_NEIGHBOURS}"
        key = settings.model_dump_json()
        if key in self._obstacles:
            return self._obstacles[key]
        try:
            difference = self._difference(settings)
        except Exception as error:  # whatever ails it, the CPU's form is there
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            if memory_is_short(error):  # which may pass
                self._without_memory(error)
                return reason
        else:
            reason = f"its result differs from the CPU's by {difference:.1e} on this device"
            if difference < 1e-4:  # not of NaN
                self._obstacles[key] = None
                return None
        _log.warning("The CPU refines, not the GPU: %s", reason)
        self._obstacles[key] = reason
        return reason

    def _without_memory(self, error: Exception) -> None:
        self.release()
        if not self._warned:  # images of one size would say it one by one
            self._warned = True
            _log.warning(
                "The GPU has no memory for refining (%s); what does not fit goes in smaller batches or to the CPU",
                error,
            )

    def _difference(self, settings: Refinement) -> float:
        """Largest difference on small problems, with rows of whole groups of four and others; NaN if one gives it."""
        return float(np.max([self._difference_at(settings, width) for width in (37, 36)]))

    def _difference_at(self, settings: Refinement, width: int) -> float:
        layer, random = self._layer, np.random.default_rng(0)
        shape = (2, 5, 13, width)
        images = self._buffers.host("image", (2, 13, width, 3), np.uint8)
        images[...] = random.integers(0, 256, images.shape)
        scores = self._buffers.host("scores", shape, np.float32)
        scores[...] = random.random(shape, np.float32) / 5
        expected = refine(scores, make_guide(images, settings.guide), settings.parameters)
        places = {name: self._buffers.device(name, host.nbytes) for name, host in (("i", images), ("s", scores))}
        layer.upload(places["i"], images, self._stream)
        layer.upload(places["s"], scores, self._stream)
        found = self(settings, places["i"], places["s"], shape)
        layer.download(scores, found, self._stream)
        layer.wait(self._stream)
        return float(np.abs(scores - expected).max())


def form_beside(obstacle: str | None) -> Form:
    """The form by which a runtime on a GPU refines: there, or else on the CPU.

    Args:
        obstacle: Why the device cannot.
    """
    if obstacle is None:
        return Form("cuda", True, "on the device where the scores are; equals the CPU's form there")
    form = choose("auto", is_torch=False)
    return Form(form.name, form.available, f"{form.reason}; not on the GPU: {obstacle}")
