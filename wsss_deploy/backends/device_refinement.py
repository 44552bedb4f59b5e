"""Refinement where a runtime left its scores: on the GPU, without torch, in the runtime's own stream.

Image and scores are on the device already, so nothing but the refined scores has to leave it. **Not run yet on a
GPU**: what is tested is the kernels' code and the order of launches, by a stand-in for the driver.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from wsss_deploy.backends.device_layer import DeviceLayer
from wsss_deploy.card import Refinement
from wsss_deploy.pairwise import Form, choose, refine
from wsss_deploy.pairwise.cuda_form import refine_at
from wsss_deploy.pairwise.cuda_guide import make_guide_at
from wsss_deploy.pairwise.cuda_launch import Place
from wsss_deploy.pairwise.guides import make_guide

Shape = tuple[int, int, int, int]


class DeviceRefinement:
    """Refines in one stream, with buffers that are kept as long as the shape stays; for one thread at a time.

    Args:
        layer: The device.
        index: Its number.
        stream: Of the layer; refinement follows what is in it.
    """

    def __init__(self, layer: DeviceLayer, index: int, stream: object) -> None:
        major, minor = map(int, layer.compute_capability.split("."))
        self._layer, self._stream = layer, stream
        self._obstacles: dict[Refinement, str | None] = {}
        self._place = Place(index, layer.handle(stream), (major, minor))
        self.release()

    def release(self) -> None:
        """Give the buffers back."""
        self._shape: tuple[Shape, int] | None = None
        self._guide: Any = None
        self._weights: Any = None
        self._spare: Any = None

    def __call__(self, settings: Refinement, images: int, scores: int, shape: Shape) -> int:
        """Put a refinement into the stream; the device is active.

        Args:
            settings: One that `obstacle` has nothing against.
            images: Address of what the network saw, RGB bytes (N, H, W, 3).
            scores: Address of float32 (N, C, H, W); overwritten.
            shape: Of the scores.

        Returns:
            Address of the refined scores, which the next call overwrites.

        Raises:
            BackendError: The kernels cannot be compiled or launched, or memory is short.
        """
        batch, channels, height, width = shape
        parameters = settings.parameters
        if (shape, len(parameters.offsets)) != self._shape:
            self.release()  # before the new ones come, or both would be held
            plane = 4 * batch * height * width
            self._guide = self._layer.device_buffer(3 * plane)
            self._weights = self._layer.device_buffer(len(parameters.offsets) * plane)
            self._spare = self._layer.device_buffer(channels * plane)
            self._shape = shape, len(parameters.offsets)
        guide = int(self._guide)
        make_guide_at(self._place, settings.guide, images, (batch, height, width), guide)
        return refine_at(self._place, parameters, shape, (3, guide), scores, int(self._weights), int(self._spare))

    def timed(self, settings: Refinement, images: int, scores: int, shape: tuple[int, ...]) -> tuple[int, float]:
        """Refine as a call does and wait for it.

        Returns:
            The address, and the milliseconds that refining took; what was in the stream before is waited for first.

        Raises:
            BackendError: As a call.
        """
        count, channels, height, width = shape
        self._layer.wait(self._stream)
        start = time.perf_counter()
        found = self(settings, images, scores, (count, channels, height, width))
        self._layer.wait(self._stream)
        return found, (time.perf_counter() - start) * 1e3

    def obstacle(self, settings: Refinement) -> str | None:
        """Why a refinement cannot be done here; None if it can: a small one then equals the CPU's on this device."""
        if settings.parameters.kind == "gaussian" or settings.parameters.mean_field is not None:
            return "Gaussian weights and mean fields are refined on the CPU"
        if settings not in self._obstacles:
            self._obstacles[settings] = self._tried(settings)
        return self._obstacles[settings]

    def _tried(self, settings: Refinement) -> str | None:
        try:
            difference = self._difference(settings)
        except Exception as error:  # whatever ails it, the CPU's form is there
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None if difference < 1e-4 else f"its result differs from the CPU's by {difference:.1e} on this device"

    def _difference(self, settings: Refinement) -> float:
        """Largest difference on a small problem; NaN if it gives one."""
        layer, random = self._layer, np.random.default_rng(0)
        shape = (2, 5, 13, 37)
        with layer.active():
            images = layer.host_buffer((2, 13, 37, 3), np.uint8)
            images[...] = random.integers(0, 256, images.shape)
            scores = layer.host_buffer(shape, np.float32)
            scores[...] = random.random(shape, np.float32) / 5
            expected = refine(scores, make_guide(images, settings.guide), settings.parameters)
            buffers = [layer.device_buffer(host.nbytes) for host in (images, scores)]
            for buffer, host in zip(buffers, (images, scores), strict=True):
                layer.upload(buffer, host, self._stream)
            found = self(settings, int(buffers[0]), int(buffers[1]), shape)
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
