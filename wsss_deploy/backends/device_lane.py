"""One stream of a GPU and what calls in it share: images up, a network, a refinement, one output or masks down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.base import memory_is_short
from wsss_deploy.backends.device_layer import Buffers, DeviceLayer
from wsss_deploy.backends.device_mask import DeviceMasks
from wsss_deploy.backends.device_refinement import DeviceRefinement
from wsss_deploy.errors import BackendError
from wsss_deploy.pairwise.cuda_launch import Place

if TYPE_CHECKING:
    from wsss_deploy.card import Refinement
    from wsss_deploy.refinement import Refiner


class DeviceLane:
    """For one thread at a time, in which the device is active.

    Args:
        layer: The device.
        index: Its number.
        obstacles: See `DeviceRefinement` and `DeviceMasks`.

    Attributes:
        handle: The stream's `CUstream`.
        buffers: Device memory by the names of the network's tensors.
        refinement: In this stream.
        enlarged: Masks of the images' own sizes, in this stream.
    """

    def __init__(self, layer: DeviceLayer, index: int, obstacles: dict[str, str | None] | None = None) -> None:
        self._layer, self._stream = layer, layer.stream()
        self.handle = layer.handle(self._stream)
        self.buffers = Buffers(layer)
        major, minor = map(int, layer.compute_capability.split("."))
        place = Place(index, self.handle, (major, minor))
        found: dict[str, str | None] = {} if obstacles is None else obstacles
        self.refinement = DeviceRefinement(layer, place, self._stream, found)
        self.enlarged = DeviceMasks(layer, place, self._stream, found)

    def start(
        self,
        images: npt.NDArray[np.uint8],
        output: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        launch: Callable[[int, int], None],
        refiner: Refiner | None,
        into: npt.NDArray[Any] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Callable[[], tuple[npt.NDArray[Any], float | None]]:
        """Put upload, network, refinement, masks of other sizes and download into the stream, without waiting for them.

        Args:
            images: RGB, uint8 (N, H, W, 3).
            output: Its name.
            shape: Of the output.
            dtype: Of the output.
            launch: Puts the network into the stream, from the images' address to the output's.
            refiner: Of scores, one that the refinement has no obstacle against.
            into: Takes what comes down, of its shape; None makes an array for it.
            sizes: Height and width of each image's mask, where these are wanted in place of the scores: uint8, one
                behind the other in one row (`DeviceMasks`). None: the output as it is.

        Returns:
            A function that waits and gives the output or the masks, and the milliseconds that refining took (None if
            nothing was refined). It has to be called, or `settle`, before the next start: the buffers are the same.

        Raises:
            BackendError: CUDA failed; also by the function. Masks are wanted, and there is no memory to refine scores.
        """
        staged = self.buffers.host("image", images.shape, np.uint8)
        if sizes is None:
            result = self.buffers.host(output, shape, dtype)
        else:
            result = self.buffers.host("masks", (sum(height * width for height, width in sizes),), np.uint8)
        image = self.buffers.device("image", staged.nbytes)
        found = self.buffers.device(output, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        staged[...] = images
        self._layer.upload(image, staged, self._stream)
        launch(image, found)
        refined = None if refiner is None else self.refinement.timed(refiner.settings, image, found, shape)
        if sizes is not None and refiner is not None and refined is None:
            raise BackendError("out of memory: the scores cannot be refined on the device")
        left = found if refined is None else refined[0]
        self._layer.download(result, left if sizes is None else self.enlarged(left, shape, sizes), self._stream)

        def finish() -> tuple[npt.NDArray[Any], float | None]:
            self._layer.wait(self._stream)
            found = np.empty(result.shape, result.dtype) if into is None else into
            found[...] = result  # the buffer is the next call's
            return found, None if refined is None else refined[1]()

        return finish

    def masks_obstacle(self, settings: Refinement | None) -> str | None:
        """Why `start` cannot make masks of other sizes, of scores refined so or not at all; None if it can."""
        found = None if settings is None else self.refinement.obstacle(settings)
        return self.enlarged.obstacle() if found is None else found

    def settle(self) -> None:
        """Wait for what was started and is not wanted any more, whatever became of it."""
        with suppress(BackendError):
            self._layer.wait(self._stream)

    def failed(self, error: Exception) -> None:
        """Where memory was short, give back what is held for images of this size: it would hinder smaller batches."""
        if memory_is_short(error):
            self.settle()  # the network may be in the stream already, and works in these buffers
            self.buffers.release()
            self.refinement.release()
            self.enlarged.release()
