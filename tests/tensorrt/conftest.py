"""Stand-ins for TensorRT and a CUDA device: a plan is the ONNX file, device memory is host memory.

They follow the names and the order of calls of NVIDIA's bindings (test_bindings.py compares the names), so that all of
the building and running code is exercised but CUDA itself.
"""

from __future__ import annotations

import ctypes
import threading
import time
import types
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
import pytest

import wsss_deploy.backends.tensorrt as runner
from wsss_deploy.errors import BackendError
from wsss_deploy.pairwise import ptx_cache


class Enum:
    STRONGLY_TYPED, PREFER_AOT_PYTHON_PLUGINS = 0, 1


class Profile:
    def set_shape(self, name, low, best, high):
        assert name == "image"
        self.shapes = low, best, high


class Cache:
    def serialize(self):
        return b"timings"


class Config:
    def add_optimization_profile(self, profile):
        self.profile = profile

    def create_timing_cache(self, content):
        self.given = content
        return Cache()

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Builder:
    fail = False

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        assert flags == 0b11
        return types.SimpleNamespace()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        config.progress_monitor.phase_start("Building", None, 20)
        assert config.progress_monitor.step_complete("Building", 10)
        config.progress_monitor.phase_finish("Building")
        if Builder.fail:
            self.logger.log(ILogger.ERROR, "no room\nfor more")
            return None
        return network.content


class Parser:
    def __init__(self, network, logger):
        self.network = network

    def parse(self, content):
        try:
            onnx.load_from_string(content)
        except Exception:
            self.num_errors = 1
            return False
        self.network.content = content
        return True

    def get_error(self, index):
        return "node 3 is unknown"


class Context:
    def __init__(self, plan):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.addresses = {}

    def set_optimization_profile_async(self, index, stream):
        return True

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        count, height, width, _ = self.shape
        classes = self.session.get_outputs()[0].shape[1]
        return {
            "image": self.shape,
            "scores": (count, classes, height, width),
            "mask": (count, height, width),
        }[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, handle):
        image = view(self.addresses["image"], self.shape, np.uint8)
        for name, found in zip(("scores", "mask"), self.session.run(["scores", "mask"], {"image": image}), strict=True):
            view(self.addresses[name], found.shape, found.dtype)[...] = found
        return True


def view(address, shape, dtype):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype).reshape(shape)


class Engine:
    names = ("image", "scores", "mask")
    num_io_tensors = 3

    def __init__(self, plan):
        self.plan = plan

    def create_execution_context(self):
        return Context(self.plan)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return "FLOAT" if name == "scores" else "UINT8"


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2


class Logger(ILogger):
    def __init__(self, severity):
        pass


class IProgressMonitor:
    pass


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        return Engine(content) if content.startswith(b"\x08") else None


FAKE = types.ModuleType("tensorrt")
FAKE.__dict__.update(
    __version__="11.4.0",
    NetworkDefinitionCreationFlag=Enum,
    Builder=Builder,
    OnnxParser=Parser,
    ILogger=ILogger,
    Logger=Logger,
    IProgressMonitor=IProgressMonitor,
    Runtime=Runtime,
    nptype=lambda kind: np.float32 if kind == "FLOAT" else np.uint8,
)


class Buffer:
    """Device memory; what was in it is gone with it."""

    def __init__(self, layer, count):
        self.layer, self.memory = layer, (ctypes.c_uint8 * max(count, 1))()
        layer.live += 1
        layer.events.append("buffer")

    def __int__(self):
        return ctypes.addressof(self.memory)

    def __del__(self):
        ctypes.memset(self.memory, 255, len(self.memory))  # of floats: NaN
        self.layer.live -= 1


class Stream:
    """Notes its end."""

    def __init__(self, events):
        self.events = events

    def __del__(self):
        self.events.append("stream ends")


class FakeLayer:
    """A device of host memory that notes what crosses, and that everything happens where it is active.

    Attributes:
        most: Bytes that a buffer may have; larger ones find no memory.
    """

    name, gpu, compute_capability = "stand-in", "Stand-in 9000", "9.0"

    def __init__(self, index):
        self.uploaded, self.downloaded, self.allocated, self.live, self.events = [], [], 0, 0, []
        self.most = 10**12
        self.local = threading.local()

    @contextmanager
    def active(self):
        depth = getattr(self.local, "depth", 0)
        self.local.depth = depth + 1
        try:
            yield
        finally:
            self.local.depth = depth

    def check(self):
        assert getattr(self.local, "depth", 0), "the device is not active in this thread"

    def stream(self):
        self.check()
        return Stream(self.events)

    def handle(self, stream):
        return 7

    def wait(self, stream):
        self.check()

    def device_buffer(self, count):
        self.check()
        if count > self.most:
            raise BackendError("CUDA failed (cudaErrorMemoryAllocation)")
        self.allocated += 1
        return Buffer(self, count)

    def host_buffer(self, shape, dtype):
        self.check()
        return np.empty(shape, dtype)

    def upload(self, target, source, stream):
        self.check()
        self.uploaded.append(source.nbytes)
        ctypes.memmove(int(target), source.ctypes.data, source.nbytes)

    def download(self, target, source, stream):
        self.check()
        self.downloaded.append(target.nbytes)
        ctypes.memmove(target.ctypes.data, int(source), target.nbytes)

    def mark(self, stream):
        self.check()
        return time.perf_counter()

    def milliseconds(self, start, end):
        self.check()
        return (end - start) * 1e3


class LazyLayer(FakeLayer):
    """Does the work of a stream when it is waited for: a buffer that is written too early gives a wrong result."""

    def __init__(self, index):
        super().__init__(index)
        self.work = {}

    def handle(self, stream):
        return id(stream)

    def put(self, handle, name, do):
        self.work.setdefault(handle, []).append(do)
        self.events.append((name, handle))

    def upload(self, target, source, stream):
        address, count = source.ctypes.data, source.nbytes
        self.put(id(stream), "upload", lambda: ctypes.memmove(int(target), address, count))

    def download(self, target, source, stream):
        address, count = target.ctypes.data, target.nbytes
        self.put(id(stream), "download", lambda: ctypes.memmove(address, int(source), count))

    def wait(self, stream):
        self.check()
        self.events.append(("wait", id(stream)))
        for do in self.work.pop(id(stream), []):
            do()


@pytest.fixture
def lazy_machine(machine, monkeypatch):
    """`machine`, whose layers do a stream's work, the network's included, when it is waited for."""

    def opened(index):
        machine.append(LazyLayer(index))
        return machine[-1]

    execute = Context.execute_async_v3

    def put(context, handle):
        machine[-1].put(handle, "network", lambda: execute(context, handle))
        return True

    monkeypatch.setattr(runner, "open_device", opened)
    monkeypatch.setattr(Context, "execute_async_v3", put)
    return machine


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with stand-ins for driver, TensorRT and GPU; gives the layers that were opened."""
    layers = []

    def opened(index):
        layers.append(FakeLayer(index))
        return layers[-1]

    monkeypatch.setitem(__import__("sys").modules, "tensorrt", FAKE)
    monkeypatch.setattr(runner.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(runner, "open_device", opened)
    monkeypatch.setattr("export.tensorrt_engine.open_device", opened)
    monkeypatch.setattr("wsss_deploy.backends.can_run", lambda name: (True, "stand-in"))
    monkeypatch.setattr(ptx_cache, "folder", lambda: tmp_path / "cache" / "ptx")
    Builder.fail = False
    return layers


@pytest.fixture
def layer():
    """A device of host memory."""
    return FakeLayer(0)
