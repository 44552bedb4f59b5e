"""One stream of a GPU and what calls in it share: images up, a network, a refinement, one output down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.base import memory_is_short
from wsss_deploy.backends.device_layer import Buffers, DeviceLayer
from wsss_deploy.backends.device_refinement import DeviceRefinement
from wsss_deploy.errors import BackendError

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner


class DeviceLane:
    """For one thread at a time, in which the device is active.

    Args:
        layer: The device.
        index: Its number.
        obstacles: See `DeviceRefinement`.

    Attributes:
        handle: The stream's `CUstream`.
        buffers: Device memory by the names of the network's tensors.
        refinement: In this stream.
    """

    def __init__(self, layer: DeviceLayer, index: int, obstacles: dict[str, str | None] | None = None) -> None:
        self._layer, self._stream = layer, layer.stream()
        self.handle = layer.handle(self._stream)
        self.buffers = Buffers(layer)
        self.refinement = DeviceRefinement(layer, index, self._stream, obstacles)

    def start(
        self,
        images: npt.NDArray[np.uint8],
        output: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        launch: Callable[[int, int], None],
        refiner: Refiner | None,
        into: npt.NDArray[Any] | None = None,
    ) -> Callable[[], tuple[npt.NDArray[Any], float | None]]:
        """Put upload, network, refinement and download into the stream, without waiting for them.

        Args:
            images: RGB, uint8 (N, H, W, 3).
            output: Its name.
            shape: Of the output.
            dtype: Of the output.
            launch: Puts the network into the stream, from the images' address to the output's.
            refiner: Of scores, one that the refinement has no obstacle against.
            into: Takes the output, of its shape; None makes an array for it.

        Returns:
            A function that waits and gives the output, and the milliseconds that refining it took (None if it was not
            refined). It has to be called, or `settle`, before the next start: the buffers are the same.

        Raises:
            BackendError: CUDA failed; also by the function.
        """
        staged, result = self.buffers.host("image", images.shape, np.uint8), self.buffers.host(output, shape, dtype)
        image, found = self.buffers.device("image", staged.nbytes), self.buffers.device(output, result.nbytes)
        staged[...] = images
        self._layer.upload(image, staged, self._stream)
        launch(image, found)
        refined = None if refiner is None else self.refinement.timed(refiner.settings, image, found, shape)
        self._layer.download(result, found if refined is None else refined[0], self._stream)

        def finish() -> tuple[npt.NDArray[Any], float | None]:
            self._layer.wait(self._stream)
            found = np.empty(result.shape, result.dtype) if into is None else into
            found[...] = result  # the buffer is the next call's
            return found, None if refined is None else refined[1]()

        return finish

    def settle(self) -> None:
        """Wait for what was started and is not wanted any more, whatever became of it."""
        with suppress(BackendError):
            self._layer.wait(self._stream)

    def failed(self, error: Exception) -> None:
        """Where memory was short, give back what is held for images of this size: it would hinder smaller batches."""
        if memory_is_short(error):
            self.buffers.release()
            self.refinement.release()
