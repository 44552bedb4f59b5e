"""What a runner needs of CUDA behind one small interface, over pycuda or NVIDIA's cuda-bindings.

Both use the device's primary context, which torch uses, too. pycuda comes first where both are installed; it has no
CUDA graphs, whose capture (`capture_graph`) goes through cuda-bindings on any stream. **Not run yet on a GPU.**
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import numpy as np

from wsss_deploy.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray


_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class DeviceLayer(Protocol):
    """One CUDA device. Every method but `active` is called inside of `active()`, in any thread.

    Attributes:
        name: "pycuda" or "cuda-bindings".
        gpu: Name of the device.
        compute_capability: For example "9.0".
    """

    name: str
    gpu: str
    compute_capability: str

    def active(self) -> AbstractContextManager[None]:
        """The device's primary context is current in this thread."""
        ...

    def stream(self) -> Any:
        """A new stream; kept by its owner."""
        ...

    def handle(self, stream: Any) -> int:
        """The stream's `CUstream`."""
        ...

    def wait(self, stream: Any) -> None:
        """Wait for all that was put into the stream."""
        ...

    def device_buffer(self, count: int) -> Any:
        """Bytes on the device; freed with the object, in whatever thread. Its address is `int()` of it."""
        ...

    def host_buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array."""
        ...

    def upload(self, target: Any, source: NDArray[Any], stream: Any) -> None:
        """Copy a page-locked array to the device, asynchronously."""
        ...

    def download(self, target: NDArray[Any], source: Any, stream: Any) -> None:
        """Copy from the device into a page-locked array, asynchronously."""
        ...

    def mark(self, stream: Any) -> Any:
        """A point in the stream, for `milliseconds`."""
        ...

    def milliseconds(self, start: Any, end: Any) -> float:
        """From one mark to another of the same stream, which has been waited for."""
        ...


def open_device(index: int) -> DeviceLayer:
    """The layer that is installed.

    Args:
        index: Number of the device.

    Raises:
        BackendError: Neither library is installed, or the driver or the device does not work.
    """
    reasons = []
    for layer in (PyCudaLayer, CudaBindingsLayer):
        try:
            return layer(index)
        except ImportError as error:
            reasons.append(str(error))
        except Exception as error:  # of the libraries' own classes, which are known only once they are imported
            raise BackendError(
                f"cuda:{index} does not work: {type(error).__name__}: {error}; check the driver with nvidia-smi"
            ) from error
    raise BackendError(f"CUDA needs cuda-bindings or pycuda ({'; '.join(reasons)}); pip install 'cuda-bindings[all]'")


def _as_ours(method: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Errors of pycuda, whose classes are none of Python's own, as `BackendError`."""

    @functools.wraps(method)
    def translated(*args: _Given.args, **options: _Given.kwargs) -> _Result:
        try:
            return method(*args, **options)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"CUDA failed ({type(error).__name__}: {error})") from error

    return translated


class PyCudaLayer:
    """See `DeviceLayer`."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        import pycuda.driver as driver

        driver.init()
        self._driver: Any = driver
        device = driver.Device(index)
        self.gpu: str = device.name()
        self.compute_capability = "{}.{}".format(*device.compute_capability())
        self._context = device.retain_primary_context()

    @contextmanager
    def active(self) -> Iterator[None]:
        """See `DeviceLayer`."""
        self._enter()
        try:
            yield
        finally:
            self._driver.Context.pop()

    @_as_ours
    def _enter(self) -> None:
        self._context.push()

    @_as_ours
    def stream(self) -> Any:
        """See `DeviceLayer`."""
        return _Dropped(self._driver.Stream(), self.active)

    def handle(self, stream: Any) -> int:
        """See `DeviceLayer`."""
        return int(stream.value.handle)

    @_as_ours
    def wait(self, stream: Any) -> None:
        """See `DeviceLayer`."""
        stream.value.synchronize()

    @_as_ours
    def device_buffer(self, count: int) -> Any:
        """See `DeviceLayer`."""
        return _Dropped(self._driver.mem_alloc(max(count, 1)), self.active)

    @_as_ours
    def host_buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `DeviceLayer`."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = self._driver.pagelocked_empty(max(count, 1), np.uint8)
        return _array_of(array.ctypes.data, _Dropped(array, self.active), shape, dtype)

    @_as_ours
    def upload(self, target: Any, source: NDArray[Any], stream: Any) -> None:
        """See `DeviceLayer`."""
        self._driver.memcpy_htod_async(int(target), source, stream.value)

    @_as_ours
    def download(self, target: NDArray[Any], source: Any, stream: Any) -> None:
        """See `DeviceLayer`."""
        self._driver.memcpy_dtoh_async(target, int(source), stream.value)

    @_as_ours
    def mark(self, stream: Any) -> Any:
        """See `DeviceLayer`."""
        event = self._driver.Event()
        event.record(stream.value)
        return _Dropped(event, self.active)

    @_as_ours
    def milliseconds(self, start: Any, end: Any) -> float:
        """See `DeviceLayer`."""
        return float(start.value.time_till(end.value))


class CudaBindingsLayer:
    """See `DeviceLayer`; through the runtime API, whose context is the primary one."""

    name = "cuda-bindings"

    def __init__(self, index: int) -> None:
        from cuda.bindings import driver, runtime

        self._cuda: Any = runtime
        self._driver: Any = driver
        checked(driver.cuInit(0))
        self._context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(index))))
        properties = checked(runtime.cudaGetDeviceProperties(index))
        self.gpu: str = properties.name.decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """See `DeviceLayer`; what was current before is current again afterwards."""
        # Setting the caller's device again would make a context on it if it has none.
        checked(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def stream(self) -> Any:
        """See `DeviceLayer`; it does not wait for the default stream."""
        made = checked(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        return _Owned(made, self._cuda.cudaStreamDestroy, self.active)

    def handle(self, stream: Any) -> int:
        """See `DeviceLayer`."""
        return int(stream)

    def wait(self, stream: Any) -> None:
        """See `DeviceLayer`."""
        checked(self._cuda.cudaStreamSynchronize(stream.value))

    def device_buffer(self, count: int) -> Any:
        """See `DeviceLayer`."""
        return _Owned(checked(self._cuda.cudaMalloc(max(count, 1))), self._cuda.cudaFree, self.active)

    def host_buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `DeviceLayer`."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        owner = _Owned(checked(self._cuda.cudaMallocHost(max(count, 1))), self._cuda.cudaFreeHost, self.active)
        return _array_of(int(owner), owner, shape, dtype)

    def upload(self, target: Any, source: NDArray[Any], stream: Any) -> None:
        """See `DeviceLayer`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(self._cuda.cudaMemcpyAsync(int(target), source.ctypes.data, source.nbytes, kind, stream.value))

    def download(self, target: NDArray[Any], source: Any, stream: Any) -> None:
        """See `DeviceLayer`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(self._cuda.cudaMemcpyAsync(target.ctypes.data, int(source), target.nbytes, kind, stream.value))

    def mark(self, stream: Any) -> Any:
        """See `DeviceLayer`."""
        event = _Owned(checked(self._cuda.cudaEventCreate()), self._cuda.cudaEventDestroy, self.active)
        checked(self._cuda.cudaEventRecord(event.value, stream.value))
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """See `DeviceLayer`."""
        return float(checked(self._cuda.cudaEventElapsedTime(start.value, end.value)))


def capture_graph(handle: int, enqueue: Callable[[], None]) -> Callable[[], None]:
    """Record what a function puts into a stream as a CUDA graph.

    Args:
        handle: `CUstream` of the stream, of either layer; the device is active.
        enqueue: Puts work into the stream; has run before, so that nothing is set up while it is recorded.

    Returns:
        A function that launches the graph in the stream.

    Raises:
        BackendError: cuda-bindings is not installed, or the work cannot be recorded.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(f"CUDA graphs need cuda-bindings ({error}); pip install cuda-bindings") from error
    stream = runtime.cudaStream_t(handle)
    checked(runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    try:
        enqueue()
    finally:
        status, graph = runtime.cudaStreamEndCapture(stream)
    checked((status,))
    executable = checked(runtime.cudaGraphInstantiate(graph, 0))
    checked(runtime.cudaGraphDestroy(graph))
    owner = _Owned(executable, runtime.cudaGraphExecDestroy)

    def launch() -> None:
        checked(runtime.cudaGraphLaunch(owner.value, stream))

    return launch


def checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of cuda-bindings.

    Raises:
        BackendError: Its status is an error.
    """
    status, *values = answer
    if int(status) != 0:
        raise BackendError(f"CUDA failed ({getattr(status, 'name', status)})")
    return values[0] if values else None


class _Owned:
    """Something of CUDA's that is released with this object, where its device is current."""

    def __init__(
        self,
        value: Any,
        release: Callable[[Any], Any],
        active: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.value, self._release, self._active = value, release, active

    def __int__(self) -> int:
        return int(self.value)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the process ends, and the libraries may be gone already
            with self._active():
                self._release(self.value)


class _Dropped:
    """Something of pycuda's, which is released where its context is current and leaks anywhere else."""

    def __init__(self, value: Any, active: Callable[[], AbstractContextManager[None]]) -> None:
        self.value, self._active = value, active

    def __int__(self) -> int:
        return int(self.value)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with self._active():
                del self.value


def _array_of(address: int, owner: object, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array over memory that lives as long as its owner, which the array keeps."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_uint8 * max(count, 1)).from_address(address)
    # numpy keeps the ctypes object alive, and that keeps the owner.
    memory.owner = owner
    array: NDArray[Any] = np.frombuffer(memory, np.uint8)[:count].view(dtype).reshape(shape)
    return array


class Buffers:
    """Memory by name, which grows with what is asked for and is kept; for one thread at a time.

    Images of many sizes then soon need no allocation, each of which waits for the whole device.

    Args:
        layer: The device, active whenever a method is called.
    """

    def __init__(self, layer: DeviceLayer) -> None:
        self._layer = layer
        self._device: dict[str, tuple[Any, int]] = {}
        self._host: dict[str, NDArray[np.uint8]] = {}

    def device(self, name: str, count: int) -> int:
        """Address of at least so many bytes on the device; others of this name are gone if they were too few.

        Raises:
            BackendError: Memory is short.
        """
        if name not in self._device or self._device[name][1] < count:
            self._device.pop(name, None)  # before the new one, or both would be held
            self._device[name] = self._layer.device_buffer(count), count
        return int(self._device[name][0])

    def host(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array; of this name there is one at a time.

        Raises:
            BackendError: Memory is short.
        """
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._host or len(self._host[name]) < count:
            self._host.pop(name, None)
            self._host[name] = self._layer.host_buffer((count,), np.uint8)
        array: NDArray[Any] = self._host[name][:count].view(dtype).reshape(shape)
        return array

    def release(self) -> None:
        """Give everything back."""
        self._device.clear()
        self._host.clear()
