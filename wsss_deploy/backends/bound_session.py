"""An ONNX Runtime session whose inputs and outputs stay on the GPU (IOBinding), in one stream with the refinement.

Bytes of images go up from page-locked memory, one output comes down; copies, network and refinement follow each other
in one stream. **Not run yet on a GPU**: what is tested is everything with a device of host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.device_lane import DeviceLane
from wsss_deploy.backends.device_layer import DeviceLayer
from wsss_deploy.errors import BackendError

if TYPE_CHECKING:
    from wsss_deploy.card import Refinement
    from wsss_deploy.refinement import Refiner

_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class BoundSession:
    """One session with one stream and one set of buffers: calls of several threads take turns.

    Args:
        open_session: Opens the session with `user_compute_stream` set to the `CUstream` given to it.
        layer: The device.
        index: Its number.
        classes: Channels of the scores.
        device_type: ONNX Runtime's name of the device.

    Attributes:
        session: The session.
    """

    def __init__(
        self,
        open_session: Callable[[int], Any],
        layer: DeviceLayer,
        index: int,
        classes: int,
        device_type: str = "cuda",
    ) -> None:
        self._layer, self._classes, self._device = layer, classes, (device_type, index)
        self._lock = threading.Lock()
        self._able: set[Refinement | None] = set()  # after which masks are made on the device
        with layer.active():
            self._lane = DeviceLane(layer, index)
            self.session: Any = open_session(self._lane.handle)
        outputs = self.session.get_outputs()
        self._types = {item.name: np.dtype(_TYPES[item.type]) for item in outputs if item.type in _TYPES}

    def __del__(self) -> None:
        # Before its stream, on which it still may put work when it ends.
        self.session = None

    @property
    def binds_all(self) -> bool:
        """Whether every output is of a type that is bound."""
        return len(self._types) == len(self.session.get_outputs())

    def obstacle(self, settings: Refinement) -> str | None:
        """Why the device cannot refine the scores, see `DeviceRefinement.obstacle`; None if it can."""
        if self._types.get("scores") != np.float32:
            return "the model's scores are not float32"
        try:
            with self._lock, self._layer.active():
                return self._lane.refinement.obstacle(settings)
        except BackendError as error:  # of a device that does not work any more
            return str(error)

    def masks_at_obstacle(self, settings: Refinement | None) -> str | None:
        """See `SizedMasks`."""
        if self._types.get("scores") != np.float32:
            return "the model's scores are not float32"
        if settings in self._able:  # without waiting for other calls
            return None
        try:
            with self._lock, self._layer.active():
                found = self._lane.masks_obstacle(settings)
                if found is None:
                    self._able.add(settings)
                return found
        except BackendError as error:  # of a device that does not work any more
            return str(error)

    def run(
        self,
        output: str,
        images: npt.NDArray[np.uint8],
        refiner: Refiner | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[npt.NDArray[Any], float | None]:
        """One output, and the milliseconds that refining it took; None if it is not refined.

        Args:
            output: "scores" or "mask".
            images: RGB, uint8 (N, H, W, 3), none of them 0.
            refiner: Of scores. What the device cannot refine is left to the caller.
            sizes: As in `DeviceLane.start`, where `masks_at_obstacle` has nothing against it.

        Raises:
            BackendError: CUDA failed.
        """
        there = refiner if sizes is not None or (refiner and self.obstacle(refiner.settings) is None) else None
        with self._lock, self._layer.active():
            if output not in self._types:  # of a type that is not bound
                return self.session.run([output], {"image": images})[0], None
            count, height, width, _ = images.shape
            shape = (count, height, width) if output == "mask" else (count, self._classes, height, width)

            def launch(image: int, found: int) -> None:
                binding = self.session.io_binding()
                binding.bind_input("image", *self._device, np.uint8, images.shape, image)
                binding.bind_output(output, *self._device, self._types[output], shape, found)
                # Without its wait at the end, which it can be told to leave out, ONNX Runtime would keep what it has
                # staged in page-locked memory until the session ends.
                self.session.run_with_iobinding(binding)

            try:
                return self._lane.start(images, output, shape, self._types[output], launch, there, sizes=sizes)()
            except Exception as error:
                self._lane.failed(error)
                raise
