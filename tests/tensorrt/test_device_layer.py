"""Both device layers against stand-ins of their libraries, and the real ones where no driver is."""

from __future__ import annotations

import ctypes
import enum
import sys
import types

import numpy as np
import pytest

from wsss_deploy.backends.device_layer import CudaBindingsLayer, PyCudaLayer, capture_graph, open_device
from wsss_deploy.errors import BackendError


class FakeRuntime(types.ModuleType):
    """cuda.bindings.runtime over host memory; notes calls."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.calls, self.device, self.memory = [], 0, {}

    def cudaGetDeviceProperties(self, index):
        return 0, types.SimpleNamespace(name=b"Fake", major=9, minor=0)

    def cudaGetDevice(self):
        return 0, self.device

    def cudaSetDevice(self, index):
        self.device = index
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):
        return 0, 11

    def cudaStreamSynchronize(self, stream):
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
def runtime(monkeypatch):
    fake = FakeRuntime()
    package = types.ModuleType("cuda.bindings")
    package.runtime = fake
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    return fake


def test_cuda_bindings_is_taken_where_pycuda_is_absent(runtime):
    layer = open_device(1)
    assert (layer.name, layer.gpu, layer.compute_capability) == ("cuda-bindings", "Fake", "9.0")
    with layer.active():
        assert runtime.device == 1
        stream = layer.stream()
        values = layer.host_buffer((2, 3), np.float32)
        values[...] = np.arange(6).reshape(2, 3)
        back = layer.host_buffer((2, 3), np.float32)
        buffer = layer.device_buffer(24)
        layer.upload(buffer, values, stream)
        layer.download(back, buffer, stream)
        layer.wait(stream)
        np.testing.assert_array_equal(back, values)
    assert runtime.device == 0
    del values, back, buffer
    assert runtime.memory == {}, "everything is freed with its object"


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


def test_pycuda_comes_first(monkeypatch, runtime):
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

    driver = types.ModuleType("pycuda.driver")
    driver.init, driver.Device, driver.Context = lambda: None, Device, Context
    package = types.ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    layer = open_device(0)
    assert isinstance(layer, PyCudaLayer)
    assert layer.compute_capability == "9.0"
    with pytest.raises(ZeroDivisionError), layer.active():
        _ = 1 / 0
    assert pushed == ["push", "pop"]


def test_neither_library(monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"pip install 'wsss-deploy\[tensorrt\]'"):
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
