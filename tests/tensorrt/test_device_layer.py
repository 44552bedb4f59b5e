"""Both device layers against stand-ins of their libraries, and the real ones where no driver is."""

from __future__ import annotations

import ctypes
import enum
import sys
import types

import numpy as np
import pytest
import torch

from wsss_deploy.backends.device_lane import DeviceLane
from wsss_deploy.backends.device_layer import (
    Buffers,
    CudaBindingsLayer,
    PyCudaLayer,
    capture_graph,
    checked,
    open_device,
)
from wsss_deploy.backends.device_mask import parted
from wsss_deploy.errors import BackendError
from wsss_deploy.refinement import DEFAULT, Refiner
from wsss_deploy.upsampling import best_class


class FakeRuntime(types.ModuleType):
    """cuda.bindings.runtime over host memory; notes calls."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.calls, self.memory = [], {}

    def cudaGetDeviceProperties(self, index):
        return 0, types.SimpleNamespace(name=b"Fake", major=9, minor=0)

    def cudaStreamCreateWithFlags(self, flags):
        return 0, 11

    def cudaStreamSynchronize(self, stream):
        return (0,)

    def cudaStreamDestroy(self, stream):
        self.calls.append("stream destroyed")
        return (0,)

    def cudaMalloc(self, count):
        memory = (ctypes.c_uint8 * count)()
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        self.calls.append("free")
        del self.memory[int(address)]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        ctypes.memmove(target, source, count)
        return (0,)

    def cudaEventCreate(self):
        self.times = {**getattr(self, "times", {}), len(getattr(self, "times", {})): None}
        return 0, len(self.times) - 1

    def cudaEventRecord(self, event, stream):
        assert stream == 11
        self.times[event] = 2.5 * event
        return (0,)

    def cudaEventElapsedTime(self, start, end):
        return 0, self.times[end] - self.times[start]

    def cudaEventDestroy(self, event):
        self.calls.append("event destroyed")
        return (0,)

    def cudaStream_t(self, handle):
        return handle

    def cudaStreamBeginCapture(self, stream, mode):
        self.calls.append("begin")
        return (0,)

    def cudaStreamEndCapture(self, stream):
        self.calls.append("end")
        return 0, "graph"

    def cudaGraphInstantiate(self, graph, flags):
        return 0, "executable"

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphExecDestroy(self, executable):
        self.calls.append("destroyed")
        return (0,)

    def cudaGraphLaunch(self, executable, stream):
        self.calls.append(("launch", executable, stream))
        return (0,)


@pytest.fixture
def runtime(monkeypatch, contexts):
    fake = FakeRuntime()
    package = types.ModuleType("cuda.bindings")
    package.runtime, package.driver = fake, contexts
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", contexts)
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    return fake


def test_cuda_bindings_is_taken_where_pycuda_is_absent(runtime, contexts):
    layer = open_device(1)
    assert (layer.name, layer.gpu, layer.compute_capability) == ("cuda-bindings", "Fake", "9.0")
    with layer.active():
        assert contexts.contexts == ["context 1"]
        stream = layer.stream()
        values = layer.host_buffer((2, 3), np.float32)
        values[...] = np.arange(6).reshape(2, 3)
        back = layer.host_buffer((2, 3), np.float32)
        buffer = layer.device_buffer(24)
        layer.upload(buffer, values, stream)
        layer.download(back, buffer, stream)
        layer.wait(stream)
        np.testing.assert_array_equal(back, values)
    assert contexts.contexts == []
    del values, back, buffer, stream
    assert runtime.memory == {}, "everything is freed with its object"
    assert runtime.calls[-1] == "stream destroyed"


def test_time_between_marks(runtime):
    layer = open_device(0)
    with layer.active():
        stream = layer.stream()
        start, end = layer.mark(stream), layer.mark(stream)
        assert layer.milliseconds(start, end) == 2.5
    del start, end
    assert runtime.calls == 2 * ["event destroyed"]


def test_a_graph_is_recorded_and_launched(runtime):
    launch = capture_graph(5, lambda: runtime.calls.append("work"))
    launch()
    assert runtime.calls == ["begin", "work", "end", ("launch", "executable", 5)]
    del launch
    assert runtime.calls[-1] == "destroyed"


def test_a_failing_call_names_its_status(runtime):
    status = enum.IntEnum("Status", {"cudaErrorMemoryAllocation": 2}).cudaErrorMemoryAllocation
    runtime.cudaMalloc = lambda count: (status, None)
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        CudaBindingsLayer(0).device_buffer(8)


class Scoped:
    """Something of pycuda's, which is released only where its context is current."""

    def __init__(self, pushed):
        self.pushed = pushed

    def __int__(self):
        return 5

    def __del__(self):
        self.pushed.append("released" if self.pushed.count("push") > self.pushed.count("pop") else "leaked")


@pytest.fixture
def pycuda(monkeypatch, runtime):
    pushed = []

    class Context:
        def push(self):
            pushed.append("push")

        @staticmethod
        def pop():
            pushed.append("pop")

    class Device:
        def __init__(self, index):
            self.index = index

        def name(self):
            return "Fake"

        def compute_capability(self):
            return 9, 0

        def retain_primary_context(self):
            return Context()

    class Error(Exception):
        """Of pycuda's own classes, which derive from none of Python's."""

    def mem_alloc(count):
        if count > 1000:
            raise Error("cuMemAlloc failed: out of memory")
        return Scoped(pushed)

    driver = types.ModuleType("pycuda.driver")
    driver.init, driver.Device, driver.Context = lambda: None, Device, Context
    driver.mem_alloc, driver.Stream = mem_alloc, lambda: Scoped(pushed)

    def pagelocked_empty(count, dtype):
        # pycuda's array holds what is released with it.
        memory = (ctypes.c_uint8 * count)()
        memory.held = Scoped(pushed)
        return np.frombuffer(memory, dtype)

    class Event(Scoped):
        def __init__(self):
            super().__init__(pushed)

        def record(self, stream):
            self.stream = stream

        def time_till(self, end):
            assert end.stream is self.stream
            return 1.5

    driver.pagelocked_empty, driver.Event = pagelocked_empty, Event
    package = types.ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return pushed


def test_pycuda_comes_first(pycuda):
    layer = open_device(0)
    assert isinstance(layer, PyCudaLayer)
    assert layer.compute_capability == "9.0"
    with pytest.raises(ZeroDivisionError), layer.active():
        _ = 1 / 0
    assert pycuda == ["push", "pop"]


def test_what_is_pycudas_goes_where_its_context_is_current(pycuda):
    layer = open_device(0)
    with layer.active():
        buffer, stream = layer.device_buffer(8), layer.stream()
        values = layer.host_buffer((2, 3), np.float32)
        values[...] = 1
    assert (int(buffer), values.sum()) == (5, 6)
    part = values[1:]
    del buffer, stream, values
    assert pycuda == ["push", "pop"] + 2 * ["push", "released", "pop"]
    del part
    assert pycuda == ["push", "pop"] + 3 * ["push", "released", "pop"]


def test_time_between_marks_of_pycuda(pycuda):
    layer = open_device(0)
    with layer.active():
        stream = layer.stream()
        start, end = layer.mark(stream), layer.mark(stream)
        assert layer.milliseconds(start, end) == 1.5
    del start, end
    assert pycuda == ["push", "pop"] + 2 * ["push", "released", "pop"]


def test_buffers_grow_and_give_views(runtime):
    layer = open_device(0)
    with layer.active():
        buffers = Buffers(layer)
        first = buffers.device("a", 100)
        assert buffers.device("a", 40) == first
        assert buffers.device("b", 40) != first
        whole = buffers.host("a", (4, 5), np.float32)
        whole[...] = 3
        small = buffers.host("a", (2, 3), np.uint8)
        assert small.ctypes.data == whole.ctypes.data
        del whole, small
        buffers.device("a", 200)
        buffers.host("a", (40, 5), np.float32)
        assert sorted(len(memory) for memory in runtime.memory.values()) == [40, 200, 800]
        buffers.release()
    assert runtime.memory == {}


def test_pycudas_errors_are_ours(pycuda):
    layer = open_device(0)
    with layer.active(), pytest.raises(BackendError, match=r"CUDA failed \(Error: cuMemAlloc failed: out of memory\)"):
        layer.device_buffer(2000)


def test_neither_library(monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"pip install 'cuda-bindings\[all\]'"):
        open_device(0)


def test_the_real_bindings_without_a_driver():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(BackendError, match="cuda:0 does not work"):
            open_device(0)
    else:
        pytest.skip("there is a driver")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("refiner", [None, Refiner(DEFAULT)])
def test_a_lane_on_a_gpu(refiner):
    from cuda.bindings import runtime

    layer = open_device(0)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 40, 52, 3), dtype=np.uint8)
    given = random.random((3, 6, 40, 52), np.float32) / 6
    expected = given if refiner is None else refiner(given.copy(), images)
    sizes = [(40, 52), (90, 117), (21, 30)]
    with layer.active():
        lane = DeviceLane(layer, 0)
        assert lane.enlarged.obstacle() is None
        assert refiner is None or lane.refinement.obstacle(refiner.settings) is None
        stream = torch.cuda.ExternalStream(lane.handle, device="cuda:0")
        scores = torch.from_numpy(given).to("cuda:0")
        torch.cuda.synchronize()
        inside = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def network(image, found):
            """In the lane's stream, after the upload: scores of the images that have come."""
            with torch.cuda.stream(stream):
                seen = torch.empty(images.shape, dtype=torch.uint8, device="cuda:0")
                checked(runtime.cudaMemcpyAsync(seen.data_ptr(), image, seen.nbytes, inside, lane.handle))
                right = (seen == torch.from_numpy(images).pin_memory().to("cuda:0", non_blocking=True)).all()
                scores.mul_(right)
                checked(runtime.cudaMemcpyAsync(found, scores.data_ptr(), scores.nbytes, inside, lane.handle))

        for _ in range(3):
            found, _ = lane.start(images, "scores", given.shape, np.float32, network, refiner)()
            np.testing.assert_allclose(found, expected, atol=2e-4)
            masks, _ = lane.start(images, "scores", given.shape, np.float32, network, refiner, None, sizes)()
            for mask, each, size in zip(parted(masks, sizes), expected, sizes, strict=True):
                assert (mask == best_class(each, *size)[0]).mean() > 0.995
