"""The TensorRT plugins against NVIDIA's real Python bindings, without a GPU.

The wheels `tensorrt-cu13-bindings` and `tensorrt-lean-cu13-libs` (11.4) hold the whole of `tensorrt.plugin` and the
plugin registry, but not the builder. Three libraries of stubs give the names that the bindings link to; so NVIDIA's
own validation of the registration runs, its registry finds the plugins, and its ahead-of-time plugin object asks ours
for shapes, launch parameters and PTX. Numbers stand in for the builder's symbolic dimensions. No engine is built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from wsss_deploy.pairwise import GaussianTerm, PairwiseParameters, cuda_source
from wsss_deploy.pairwise.cuda_launch import BLOCK

STUBS = {
    "nvinfer": "void* createInferBuilder_INTERNAL(void* a, int v) {return 0;}\n"
    "void* createInferRefitter_INTERNAL(void* a, void* b, int v) {return 0;}\n"
    "void* getBuilderPluginRegistry(int c) {return 0;}",
    "nvinfer_plugin": "int initLibNvInferPlugins(void* a, const char* b) {return 1;}",
    "nvonnxparser": "void* createNvOnnxParser_INTERNAL(void* a, void* b, int v) {return 0;}\n"
    "void* createNvOnnxParserRefitter_INTERNAL(void* a, void* b, int v) {return 0;}\n"
    "int getNvOnnxParserVersion(void) {return 110400;}",
}
CASES = {
    "par": PairwiseParameters(dilations=(2, 4, 8, 16), iterations=8, normalise=True),
    "gaussian": PairwiseParameters(
        kind="gaussian", dilations=(1, 3), normalise=True, terms=(GaussianTerm(sigma_rgb=0.1),)
    ),
}
SIZES = [(1, 3, 512, 512), (3, 3, 37, 91), (1, 3, 1, 1)]
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt

class Number:
    def __init__(self, value):
        self.value = value
    def is_constant(self):
        return True
    def get_constant_value(self):
        return self.value
    def is_size_tensor(self):
        return False

class Builder:
    def constant(self, value):
        return Number(value)
    def operation(self, kind, a, b):
        rules = {"SUM": lambda: a.value + b.value, "PROD": lambda: a.value * b.value,
                 "CEIL_DIV": lambda: -(-a.value // b.value)}
        return Number(rules[str(kind).rpartition(".")[2]]())

class SymExpr:
    pass

class Sizes(dict):
    nbSymExprs = 0

# The bindings' own can be made by the builder only.
trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Number, lambda count: [None] * count, SymExpr
import tensorrt_bindings.plugin as plugin
sys.modules["tensorrt.plugin"] = plugin
from types import SimpleNamespace
from export.tensorrt_plugin import register_plugins
register_plugins()
register_plugins()

def described(shape, kind):
    desc = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims, inner.type, inner.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
    desc.desc = inner
    return desc

request, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
kinds = {"float": trt.DataType.FLOAT, "half": trt.DataType.HALF}
answers = []
for number, ask in enumerate(request):
    creator = trt.get_plugin_registry().get_creator(ask["node"], "1", "wsss")
    field = trt.PluginField("parameters", ask["parameters"].encode(), trt.PluginFieldType.CHAR)
    made = creator.create_plugin(ask["node"], "wsss", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD,
                                 trt.QuickPluginCreationRequest.STRICT_AOT)
    kind, inputs = kinds[ask["type"]], ask["inputs"]
    types = made.get_output_data_types([kind] * len(inputs), [len(shape) for shape in inputs])
    (out,) = made.get_output_shapes([[Number(size) for size in shape] for shape in inputs], [], Builder())
    out = [size.value for size in out]
    ports = [described(shape, kind) for shape in [*inputs, out]]
    combinations = made.get_supported_format_combinations(ports, len(inputs))
    made.configure_plugin(ports[:-1], ports[-1:])
    tactics = made.get_valid_tactics()
    made.set_tactic(0)
    launch, sizes = SimpleNamespace(), Sizes()
    made.get_launch_params(inputs, ports, len(inputs), launch, sizes, Builder())
    name, code = made.get_kernel([port.desc for port in ports[:-1]], [ports[-1].desc])
    (folder / f"{number}.ptx").write_bytes(code)
    answers.append({
        "plugin": type(made).__name__, "type_kept": [item == kind for item in types], "out": out, "kernel": name,
        "combinations": [str(item.type).rpartition(".")[2] for item in combinations], "tactics": tactics,
        "grid": [getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"],
        "block": [getattr(launch, f"block_{axis}").expr.value for axis in "xyz"],
        "shared": launch.shared_mem.expr.value,
        "sizes": [sizes[index].expr.value for index in range(sizes.nbSymExprs)],
        "int32": [str(sizes[index].dtype).rpartition(".")[2] for index in range(sizes.nbSymExprs)],
    })
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """Folder with libraries under which NVIDIA's bindings can be imported without a driver."""
    bindings, lean = (find_spec(name) for name in ("tensorrt_bindings", "tensorrt_lean_libs"))
    if bindings is None or lean is None:
        pytest.skip("needs the wheels tensorrt-cu13-bindings and tensorrt-lean-cu13-libs, 11.4")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc for the stubs")
    libraries = Path(next(iter(lean.submodule_search_locations)))
    (runtime,) = libraries.glob("libnvinfer_lean.so.*")
    version = runtime.name.rpartition(".")[2]
    folder = tmp_path_factory.mktemp("stubs")
    for name, code in STUBS.items():
        (folder / f"{name}.c").write_text(code)
        target = f"lib{name}.so.{version}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{target}", "-o", target, f"{name}.c"]
        if name == "nvinfer":
            command += ["-Wl,--no-as-needed", f"-L{libraries}", f"-l:{runtime.name}", f"-Wl,-rpath,{libraries}"]
        subprocess.run(command, check=True, cwd=folder)
    return folder


# What export/tensorrt_engine.py and wsss_deploy/backends/tensorrt.py call; tests/tensorrt has stand-ins of the same.
USED = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "IBuilderConfig": "add_optimization_profile create_timing_cache set_timing_cache get_timing_cache progress_monitor",
    "IOptimizationProfile": "set_shape",
    "OnnxParser": "parse num_errors get_error",
    "ITimingCache": "serialize",
    "IProgressMonitor": "phase_start step_complete phase_finish",
    "ILogger": "log ERROR INTERNAL_ERROR",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context num_io_tensors get_tensor_name get_tensor_dtype",
    "IExecutionContext": "set_optimization_profile_async set_input_shape get_tensor_shape set_tensor_address "
    "execute_async_v3",
}


def test_nvidias_bindings_have_what_is_called(stubs):
    code = (
        "import json, sys\nimport tensorrt_bindings as trt\n"
        "used = json.loads(sys.argv[1])\n"
        "pairs = [(kind, name) for kind in used for name in used[kind].split()]\n"
        "print([pair for pair in pairs if not hasattr(getattr(trt, pair[0]), pair[1])])\n"
        "class Logger(trt.ILogger):\n"
        "    def __init__(self):\n        trt.ILogger.__init__(self)\n"
        "    def log(self, severity, message):\n        pass\n"
        "class Monitor(trt.IProgressMonitor):\n"
        "    def __init__(self):\n        trt.IProgressMonitor.__init__(self)\n"
        "Logger(), Monitor(), trt.nptype(trt.DataType.UINT8)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    line = [sys.executable, "-c", code, json.dumps(USED)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def ask(stubs, tmp_path_factory):
    """Call with requests; NVIDIA's answers, and the folder with the PTX of each by its number."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings with NVRTC")

    def run(requests):
        out = tmp_path_factory.mktemp("ptx")
        environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
        line = [sys.executable, "-c", SCRIPT, json.dumps(requests), str(out)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "half"])
def test_both_plugins(ask, kind):
    requests = []
    for parameters in CASES.values():
        text, count = parameters.to_json(), len(parameters.offsets)
        for batch, channels, height, width in SIZES:
            guide, weights = (batch, channels, height, width), (batch, count, height, width)
            shared = {"parameters": text, "type": kind}
            requests.append({"node": "PairwiseAffinity", "inputs": [guide], "out": weights, **shared})
            masks = (batch, 21, height, width)
            requests.append({"node": "PairwiseStep", "inputs": [masks, weights], "out": masks, **shared})
    answers, folder = ask(requests)
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        step = request["node"] == "PairwiseStep"
        first = request["inputs"][0]
        assert answer["plugin"] == "_TemplateAOTPlugin"
        assert answer["type_kept"] == [True]
        assert answer["out"] == list(request["out"])
        assert answer["kernel"] == ("wsss_pairwise_step" if step else "wsss_pairwise_affinity")
        ports = 3 if step else 2
        assert answer["combinations"] == ["FLOAT"] * ports + ["HALF"] * ports
        pixels = first[0] * first[2] * first[3]
        assert answer["grid"] == [-(-pixels // BLOCK), 1, 1]
        assert answer["block"] == [BLOCK, 1, 1]
        assert answer["shared"] == 0
        assert answer["sizes"] == list(first)
        assert set(answer["int32"]) == {"INT32"}
        # What tests/pairwise/test_cuda_form.py launches where there is a GPU.
        storage = "__half" if kind == "half" else "float"
        program = cuda_source.ptx(PairwiseParameters.model_validate_json(request["parameters"]), storage)
        assert (folder / f"{number}.ptx").read_bytes() == program
        code = program.decode()
        (arguments,) = re.findall(rf"\.entry {answer['kernel']}\(([^)]*)\)", code)
        # TensorRT's order: inputs, the four sizes, output.
        assert re.findall(r"\.param \.(\w+)", arguments) == ["u64"] * len(request["inputs"]) + ["u32"] * 4 + ["u64"]
        assert ("cvt.f32.f16" in code) == (kind == "half")


def test_more_neighbours_than_the_kernels_take_are_refused_when_the_shape_is_asked_for():
    from export import tensorrt_plugin
    from wsss_deploy.errors import ExportError

    declared = {}
    plugins = MagicMock()
    plugins.register = lambda name: lambda function: declared.setdefault(name, function)
    tensorrt_plugin._register(MagicMock(), plugins)
    port = SimpleNamespace(shape_expr=(1, 3, 16, 16), dtype="float", like=lambda: "like")
    for radius, taken in ((7, True), (8, False), (32, False)):
        terms = (GaussianTerm(sigma_rgb=0.1),)
        text = PairwiseParameters(kind="gaussian", radius=radius, terms=terms).to_json()
        for name, ports in (("wsss::PairwiseAffinity", [port]), ("wsss::PairwiseStep", [port, port])):
            if taken:
                assert declared[name](*ports, text) is not None
                continue
            with pytest.raises(
                ExportError, match=rf"has {(2 * radius + 1) ** 2 - 1} neighbours, .* at most 256; choose"
            ):
                declared[name](*ports, text)


def assemblers() -> list[str]:
    """Every ptxas of this machine: the toolkit's, and those that come with triton, which torch brings along."""
    found = [Path(path)] if (path := shutil.which("ptxas")) else []
    if (triton := find_spec("triton")) is not None:
        for folder in triton.submodule_search_locations:
            found += sorted(Path(folder).glob("backends/nvidia/bin/ptxas*"))
    return [str(path) for path in found if os.access(path, os.X_OK)]


@pytest.mark.parametrize("storage", ["float", "__half"])
def test_an_assembler_takes_the_programs(tmp_path, storage):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings with NVRTC")
    judged = 0
    for name, parameters in CASES.items():
        code = tmp_path / f"{name}.ptx"
        code.write_bytes(cuda_source.ptx(parameters, storage))
        for assembler in assemblers():
            command = [assembler, "-arch=sm_90", str(code), "-o", str(code.with_suffix(".cubin"))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "Unsupported .version" in done.stderr:  # it is older than NVRTC
                continue
            assert done.returncode == 0, done.stderr
            judged += 1
    if not judged:
        pytest.skip("needs a ptxas that is not older than NVRTC")


def test_without_tensorrt_it_says_what_to_install(monkeypatch):
    from export.tensorrt_plugin import register_plugins
    from wsss_deploy.errors import ExportError

    register_plugins.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"pip install 'wsss-deploy\[tensorrt\]'"):
        register_plugins()
