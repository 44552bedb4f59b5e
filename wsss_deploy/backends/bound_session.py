"""An ONNX Runtime session whose inputs and outputs stay on the GPU (IOBinding), in one stream with the refinement.

Bytes of images go up from page-locked memory, one output comes down; network, refinement and both copies follow each
other in one stream, and only the end of the last copy is waited for. **Not run yet on a GPU**: what is tested is
everything with a device of host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.device_layer import DeviceLayer
from wsss_deploy.backends.device_refinement import DeviceRefinement

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner

_TYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class BoundSession:
    """One session with one stream: calls of several threads wait for each other on the device, not before or after.

    Args:
        open_session: Opens the session with `user_compute_stream` set to the `CUstream` given to it.
        layer: The device.
        index: Its number.
        classes: Channels of the scores.
        device_type: ONNX Runtime's name of the device.
    """

    def __init__(
        self,
        open_session: Callable[[int], Any],
        layer: DeviceLayer,
        index: int,
        classes: int,
        device_type: str = "cuda",
    ) -> None:
        import onnxruntime

        self._layer, self._classes, self._device = layer, classes, (device_type, index)
        with layer.active():
            self._stream = layer.stream()
            self.refinement = DeviceRefinement(layer, index, self._stream)
            self.session: Any = open_session(layer.handle(self._stream))
        # The stream orders what is in it; waiting for it after the network would only delay what follows.
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._types = {item.name: np.dtype(_TYPES[item.type]) for item in self.session.get_outputs()}
        self._lock = threading.Lock()
        self._shape: tuple[int, ...] = ()
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._buffers: dict[str, Any] = {}

    def run(
        self, output: str, images: npt.NDArray[np.uint8], refiner: Refiner | None = None
    ) -> tuple[npt.NDArray[Any], float]:
        """One output, and the milliseconds that refining took.

        Args:
            output: "scores" or "mask".
            images: RGB, uint8 (N, H, W, 3), none of them 0.
            refiner: Of scores, one that `refinement.obstacle` has nothing against.

        Raises:
            BackendError: CUDA failed.
        """
        with self._lock, self._layer.active():
            if images.shape != self._shape:
                self._prepare(images.shape)
            host, found = self._room(output)
            self._host["image"][...] = images
            self._layer.upload(self._buffers["image"], self._host["image"], self._stream)
            self._launch(output, host.shape)
            spent = 0.0
            if refiner is not None:
                image = int(self._buffers["image"])
                found, spent = self.refinement.timed(refiner.settings, image, found, host.shape)
            self._layer.download(host, found, self._stream)
            self._layer.wait(self._stream)
            return host.copy(), spent  # the buffer is the next call's

    def _prepare(self, shape: tuple[int, ...]) -> None:
        # Old buffers go before the new ones come, or both would be held.
        self._shape, self._host, self._buffers = (), {}, {}
        self.refinement.release()
        self._host["image"] = self._layer.host_buffer(shape, np.uint8)
        self._buffers["image"] = self._layer.device_buffer(int(np.prod(shape)))
        self._shape = shape

    def _room(self, output: str) -> tuple[npt.NDArray[Any], int]:
        """Page-locked array of an output, and the address on the device where the network writes it."""
        if output not in self._host:
            count, height, width, _ = self._shape
            shape = (count, height, width) if output == "mask" else (count, self._classes, height, width)
            host = self._layer.host_buffer(shape, self._types[output])
            self._buffers[output] = self._layer.device_buffer(host.nbytes)
            self._host[output] = host
        return self._host[output], int(self._buffers[output])

    def _launch(self, output: str, shape: tuple[int, ...]) -> None:
        binding = self.session.io_binding()
        image = int(self._buffers["image"])
        binding.bind_input("image", *self._device, np.uint8, self._shape, image)
        binding.bind_output(output, *self._device, self._types[output], shape, int(self._buffers[output]))
        self.session.run_with_iobinding(binding, self._options)
