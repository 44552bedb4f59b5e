"""model.engine in TensorRT: bytes of images in, scores or just the mask out.

A few slots, each with an execution context, a stream and buffers that are kept as long as the shape stays. A call takes
a free slot, so that calls of several threads (`Segmenter.predict_stream`, for example) overlap copies, network and
post-processing; batches of one call, if they are several, take turns in the slots that are free and overlap as well.
With steady shapes the network is launched as a CUDA graph. **Not run yet on a GPU**: what is tested is everything
against stand-ins for TensorRT and the device.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.base import BATCH_PIXELS, Output, failure, refined_here
from wsss_deploy.backends.device_lane import DeviceLane
from wsss_deploy.backends.device_layer import DeviceLayer, capture_graph, open_device
from wsss_deploy.backends.device_mask import parted
from wsss_deploy.backends.device_refinement import form_beside
from wsss_deploy.card import Refinement
from wsss_deploy.engine_manifest import read_engine, read_manifest
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.pairwise import Form

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner

SLOTS = 2
_Finish: TypeAlias = Callable[[], "tuple[npt.NDArray[Any], float | None]"]
#: Where a batch's output of a shape and type goes.
_Place: TypeAlias = Callable[[tuple[int, ...], "np.dtype[Any]"], "npt.NDArray[Any]"]
#: Batches that one call takes (two in each slot, so that both stay busy), bytes of scores and pixels of masks that lie
#: in the host's memory together.
_BATCHES, _BYTES, _PIXELS = 2 * SLOTS, 2**29, 2**25
#: Calls with the same shape after which a slot records a graph; the first ones set kernels up.
_WARM = 2

_log = logging.getLogger(__name__)


class TensorRTBackend:
    """An engine on the GPU that it was built for.

    Args:
        path: The engine; its manifest lies beside it.
        device: "auto", "cuda" or "cuda:N".

    Raises:
        ArtifactError: Engine or manifest is damaged.
        BackendError: Driver, library or device is missing, or not the one that the engine was built for.
    """

    name = "tensorrt"

    def __init__(self, path: Path, device: str) -> None:
        if device == "cpu":
            raise BackendError(f"{path}: an engine runs on NVIDIA GPUs only; use model.onnx for device 'cpu'")
        manifest = read_manifest(path)
        trt = load_tensorrt()
        index = int(device.partition(":")[2] or 0)
        self.device = f"cuda:{index}"
        self._layer: DeviceLayer = open_device(index)
        manifest.check_machine(path, trt.__version__, self._layer.gpu, self._layer.compute_capability)
        content = read_engine(path, manifest)
        self._manifest, self._trt, self._path = manifest, trt, path
        obstacles: dict[str, str | None] = {}
        #: Refinements, or none, after which masks are made on the device.
        self._able: set[Refinement | None] = set()
        with self._layer.active():
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise ArtifactError(f"{path}: TensorRT cannot load it; build it anew: {manifest.command}")
            self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
            for _ in range(SLOTS):
                self._free.put(_Slot(trt, self._engine, self._layer, index, obstacles, len(manifest.card.classes)))

    def run(self, images: npt.NDArray[np.uint8], refiner: Refiner | None = None) -> Output:
        """Class probabilities, see `Backend.run`; refined before they leave the device where that is possible."""
        scores, spent = self._batches("scores", images, refiner)
        return Output(scores, spent)

    def masks(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids, see `Backend.masks`: nothing else leaves the device."""
        found: npt.NDArray[np.uint8] = self._batches("mask", images)[0]
        return found

    def masks_at(
        self, images: npt.NDArray[np.uint8], sizes: Sequence[tuple[int, int]], refiner: Refiner | None
    ) -> list[npt.NDArray[np.uint8]]:
        """See `SizedMasks`."""
        return parted(self._batches("scores", images, refiner, sizes)[0], sizes)

    def masks_at_obstacle(self, settings: Refinement | None) -> str | None:
        """See `SizedMasks`; no slot is waited for once it is known that nothing is in the way."""
        if self._manifest.shapes[0][0] > 1:
            return "the engine takes no single images"
        if settings in self._able:
            return None
        found = self._asked(lambda slot: slot.masks_at_obstacle(settings))
        if found is None:
            self._able.add(settings)
        return found

    def batch_budget(self, height: int, width: int, masks: bool) -> int:
        """Images of a size to give to one call: whole batches, one at least, enough for all slots where memory allows.

        Args:
            height: Of the images.
            width: Of the images.
            masks: For `masks`; else for `run`, whose scores take far more.
        """
        batch = self._batch(height, width)
        fitting = _PIXELS // (height * width) if masks else _BYTES // self._score_bytes(height, width)
        return batch * max(1, min(_BATCHES, fitting // batch))

    def _batch(self, height: int, width: int) -> int:
        """Images of a size that one slot takes at once.

        The largest batch that the engine takes may be meant for small images: of large ones, with many classes, the
        slot's buffers (on the device and page-locked) would hold gigabytes for as long as the backend lives.
        """
        low, best, high = self._manifest.shapes
        if low[0] > 1:  # a remainder of fewer would be refused
            return high[0]
        pixels = max(BATCH_PIXELS, best[0] * best[1] * best[2])
        fitting = max(pixels // (height * width), _BYTES // _BATCHES // self._score_bytes(height, width))
        return min(high[0], max(1, fitting))

    def _score_bytes(self, height: int, width: int) -> int:
        return 4 * len(self._manifest.card.classes) * height * width

    def refinement_form(self, settings: Refinement) -> Form:
        """See `Backend.refinement_form`."""
        return form_beside(self._asked(lambda slot: slot.obstacle(settings)))

    def _asked(self, obstacle: Callable[[_Slot], str | None]) -> str | None:
        """What a slot has against something."""
        slot = self._free.get()
        try:
            with self._layer.active():
                return obstacle(slot)
        except BackendError as error:  # of a device that does not work any more
            return str(error)
        finally:
            self._free.put(slot)

    def _batches(
        self,
        output: str,
        images: npt.NDArray[np.uint8],
        refiner: Refiner | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[npt.NDArray[Any], float]:
        """One output, or masks of `sizes` (see `DeviceLane.start`), and the milliseconds that refining took."""
        most = self._batch(*images.shape[1:3])
        for part in (images[:most], images[len(images) // most * most :]):
            if len(part) and not self._manifest.accepts(part.shape[:3]):
                raise BackendError(
                    f"{self._path.name}: takes {self._manifest.range_text()}, found "
                    f"{' x '.join(map(str, part.shape[:3]))}; resize or tile the image, or build with other "
                    f"--shapes: {self._manifest.command}"
                )
        starts = range(0, len(images), most)
        batches = [_Batch(images[s : s + most], None if sizes is None else sizes[s : s + most]) for s in starts]
        began = time.perf_counter()
        slots = [self._free.get()]
        with suppress(queue.Empty):  # another one makes copies overlap the network; who waits for it holds none
            while len(slots) < min(SLOTS, len(batches)):
                slots.append(self._free.get_nowait())
        try:
            with self._layer.active():
                whole, times = _in_turn(slots, batches, output, refiner)
        except (BackendError, MemoryError, RuntimeError) as error:
            raise self._failure(images, error) from error
        finally:
            for slot in slots:
                self._free.put(slot)
        # Neither a slot nor the device is held while the CPU refines.
        try:
            for index, ((batch, _), spent) in enumerate(zip(batches, times, strict=True)):
                if spent is None and sizes is None:
                    part = whole[index * most : index * most + len(batch)]
                    refined, times[index] = refined_here(part, batch, refiner)
                    if refiner is not None:
                        part[...] = refined
        except MemoryError as error:
            raise self._failure(images, error) from error
        # Refinements of two slots share the GPU, and each of them has the other's time as well.
        return whole, min(sum(spent or 0.0 for spent in times), (time.perf_counter() - began) * 1e3)

    def _failure(self, images: npt.NDArray[np.uint8], error: Exception) -> BackendError:
        reason = str(error).partition("\n")[0]
        return failure(f"TensorRT failed on {self.device} with images of {images.shape[:3]} ({reason})", error)

    def describe(self) -> dict[str, Any]:
        """What really runs, see `Backend.describe`."""
        return {
            "backend": self.name,
            "version": self._trt.__version__,
            "device": self.device,
            "device_reason": "engines run on GPUs",
            "device_name": self._layer.gpu,
            "device_layer": self._layer.name,
            "precision": self._manifest.card.precision,
            "shapes": [list(shape) for shape in self._manifest.shapes],
            "threads": "default",
        }


class _Batch(NamedTuple):
    """Images of one size, and the sizes of their masks where these are wanted in place of an output."""

    images: npt.NDArray[np.uint8]
    sizes: Sequence[tuple[int, int]] | None


def _pixels(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(height * width for height, width in sizes)


class _Slot:
    """One execution context with its stream and buffers; used by one thread at a time."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        layer: DeviceLayer,
        index: int,
        obstacles: dict[str, str | None],
        classes: int,
    ) -> None:
        self._classes = classes
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BackendError("TensorRT cannot create an execution context: out of memory")
        self._lane = DeviceLane(layer, index, obstacles)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        if {"image", "scores", "mask"} != set(names):
            raise ArtifactError(f"the engine has the tensors {', '.join(names)}, expected image, scores and mask")
        self._context.set_optimization_profile_async(0, self._lane.handle)
        self._shape: tuple[int, ...] = ()
        self._calls = 0
        self._graph: Callable[[], None] | None = None

    def __del__(self) -> None:
        # Before the stream and the buffers that they use.
        self._graph = self._context = None

    def obstacle(self, settings: Refinement) -> str | None:
        """Why the scores cannot be refined on the device; None if they can."""
        if self._types["scores"] != np.float32:
            return f"the engine's scores are {self._types['scores']}"
        return self._lane.refinement.obstacle(settings)

    def masks_at_obstacle(self, settings: Refinement | None) -> str | None:
        """See `SizedMasks`."""
        if self._types["scores"] != np.float32:
            return f"the engine's scores are {self._types['scores']}"
        return self._lane.masks_obstacle(settings)

    def start(self, batch: _Batch, output: str, refiner: Refiner | None, place: _Place) -> _Finish:
        """Put upload, network, refinement and download of one output into the stream, see `DeviceLane.start`."""
        images, sizes = batch
        with self._reset_on_failure():
            there = refiner if sizes is not None or (refiner and self.obstacle(refiner.settings) is None) else None
            if images.shape != self._shape:
                self._prepare(images.shape)
            shape = tuple(self._context.get_tensor_shape(output))
            if output == "scores" and shape[1] != self._classes:
                raise ArtifactError(
                    f"the engine gives {shape[1]} classes, its card names {self._classes}; export it again"
                )
            kind = self._types[output]
            # The context has the addresses already: these buffers are the lane's.
            into = place(shape, kind) if sizes is None else place((_pixels(sizes),), np.dtype(np.uint8))
            finish = self._lane.start(images, output, shape, kind, lambda *_: self._launch(), there, into, sizes)

        def finished() -> tuple[npt.NDArray[Any], float | None]:
            with self._reset_on_failure():
                return finish()

        return finished

    def settle(self) -> None:
        """Wait for what was started, whatever became of it."""
        self._lane.settle()

    @contextmanager
    def _reset_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._shape, self._graph = (), None
            self._lane.failed(error)
            raise

    def _prepare(self, shape: tuple[int, ...]) -> None:
        self._shape, self._graph, self._calls = (), None, 0
        if not self._context.set_input_shape("image", shape):
            raise BackendError(f"TensorRT refuses images of {shape}")
        for name, kind in self._types.items():
            count = int(np.prod(self._context.get_tensor_shape(name))) * kind.itemsize
            self._context.set_tensor_address(name, self._lane.buffers.device(name, count))
        self._shape = shape

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph()
            return
        if self._calls == _WARM:
            try:
                self._graph = capture_graph(self._lane.handle, self._enqueue)
                self._graph()
                return
            except BackendError as error:
                _log.debug("no CUDA graph: %s", error)
        self._calls += 1
        self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._lane.handle):
            raise BackendError("TensorRT could not run the engine")


def _in_turn(
    slots: list[_Slot], batches: list[_Batch], output: str, refiner: Refiner | None
) -> tuple[npt.NDArray[Any], list[float | None]]:
    """Outputs of batches in one array, and the times of their refinements.

    While one slot computes, the next one's batch is staged and copied. The array is there once: scores of a call that
    were joined in the end would be there twice.
    """
    whole: npt.NDArray[Any] | None = None
    times: list[float | None] = []
    started: deque[_Finish] = deque()
    filled = 0

    def place(shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
        nonlocal whole, filled
        if whole is None:
            rows = sum(len(images) if sizes is None else _pixels(sizes) for images, sizes in batches)
            whole = np.empty((rows, *shape[1:]), np.float32 if kind.kind == "f" else kind)
        filled += shape[0]
        return whole[filled - shape[0] : filled]

    try:
        for index, batch in enumerate(batches):
            slot = slots[index % len(slots)]
            if len(started) == len(slots):  # this slot's
                times.append(started.popleft()()[1])
            started.append(slot.start(batch, output, refiner, place))
        times += [finish()[1] for finish in started]
    except BaseException:
        for slot in slots:
            slot.settle()
        raise
    assert whole is not None  # there is one batch at least
    return whole, times


def load_tensorrt() -> Any:
    """The module tensorrt, once it is clear that a driver is there: without one, creating a runtime ends the process.

    Raises:
        BackendError: Library or driver is missing.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(
            f"TensorRT needs an NVIDIA driver, which is not here ({error}); run the model.onnx on the CPU"
        ) from error
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise BackendError(f"TensorRT is not installed ({error}); pip install 'wsss-deploy[tensorrt]'") from error
    return tensorrt
