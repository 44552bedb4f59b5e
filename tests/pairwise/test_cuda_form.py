"""The CUDA form without a GPU: a stand-in for the driver runs the kernels' code, compiled as C++, on CPU tensors.

What is real here: the program, the order and the types of the arguments, grid and block sizes, the order of the
steps, the cache on disk. What is not: the driver, the stream, the device's memory. `test_on_a_gpu` has not been run.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from wsss_deploy.errors import BackendError, UsageError
from wsss_deploy.pairwise import (
    PairwiseParameters,
    choose,
    cuda_check,
    cuda_form,
    cuda_launch,
    cuda_source,
    forms,
    ptx_cache,
    reference,
    refine,
    torch_ops,
)

SMALL = PairwiseParameters(dilations=(1,), iterations=1)


def test_launches_give_the_reference(case, scene, driver):
    data = scene(classes=11, height=9, width=33)
    masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
    text = case.to_json()
    weights = torch_ops.pairwise_affinity(guide, text, "cuda", 1)
    torch.testing.assert_close(weights, reference.affinity(guide, case), rtol=2e-4, atol=1e-6)
    unary = reference.unary_of(masks, case)
    out = torch_ops.pairwise_step(masks, weights, unary, text, "cuda", 1)
    torch.testing.assert_close(out, reference.step(masks, weights, case, unary), rtol=2e-5, atol=1e-6)
    refined = torch_ops.pairwise_refine(masks, guide, text, "cuda", 1)
    torch.testing.assert_close(refined, reference.refine(masks, guide, case), rtol=2e-4, atol=1e-5)
    assert len(driver.launches) == 2 + 1 + case.iterations
    pixels = 2 * 9 * 33
    for _, blocks, threads, stream in driver.launches:
        assert (blocks - 1) * threads < pixels <= blocks * threads
        assert stream == 7


def test_rows_of_whole_groups_of_four(case, scene, driver):
    text = case.to_json()
    for classes, height, width in ((1, 3, 4), (2, 1, 8), (5, 30, 4), (11, 9, 36), (21, 4, 64), (27, 5, 12)):
        data = scene(classes=classes, height=height, width=width)
        masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
        weights, unary = reference.affinity(guide, case), reference.unary_of(masks, case)
        out = torch_ops.pairwise_step(masks, weights, unary, text, "cuda", 1)
        torch.testing.assert_close(out, reference.step(masks, weights, case, unary), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dilations", [(4, 8), (1,), (2, 3), (5, 6, 7, 9)])
def test_every_distance_in_groups_of_four(scene, driver, dilations):
    parameters = PairwiseParameters(dilations=dilations, iterations=2)
    data = scene(classes=6, height=11, width=20)
    masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
    out = torch.empty_like(masks)
    cuda_form.refine(parameters, masks, guide, None, out)
    torch.testing.assert_close(out, reference.refine(masks, guide, parameters), rtol=2e-4, atol=1e-5)


def test_arrays_that_begin_between_groups(cases, scene, driver):
    data = scene(classes=3, height=5, width=8)
    parameters = cases["par"]
    masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
    weights = reference.affinity(guide, parameters)
    expected = reference.step(masks, weights, parameters)
    for which in range(3):
        out = torch.empty_like(masks)
        given = [masks, weights, out]
        moved = torch.empty(given[which].numel() + 1)[1:].view_as(given[which])
        given[which] = moved.copy_(given[which])
        assert given[which].is_contiguous()
        cuda_form.step(parameters, given[0], given[1], None, given[2])
        torch.testing.assert_close(given[2], expected, rtol=2e-5, atol=1e-6)


def test_not_finite_values_reach_their_neighbours_alone(cases, driver):
    """What a group holds beside the values that are asked for has no part in the result."""
    parameters = cases["par"]
    masks, guide = torch.rand(1, 2, 9, 16), torch.rand(1, 3, 9, 16)
    masks[0, 0, 4, [0, 2, 15]] = torch.tensor([float("nan"), float("inf"), float("nan")])
    weights = reference.affinity(guide, parameters)
    out = torch.empty_like(masks)
    cuda_form.step(parameters, masks, weights, None, out)
    torch.testing.assert_close(out, reference.step(masks, weights, parameters), rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_steps_go_to_and_fro_and_end_in_the_result(cases, scene, driver, iterations):
    parameters = cases["par"].model_copy(update={"iterations": iterations})
    data = scene(height=5, width=6)
    masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
    before, out = masks.clone(), torch.full_like(masks, float("nan"))
    cuda_form.refine(parameters, masks, guide, None, out)
    torch.testing.assert_close(out, reference.refine(masks, guide, parameters), rtol=2e-4, atol=1e-5)
    assert torch.equal(masks, before)


def test_gradients_go_through_it(cases, scene, driver):
    data = scene(height=6, width=7)
    masks, guide = (torch.from_numpy(array).float() for array in (data.masks, data.guide))
    text, grads = cases["par"].to_json(), []
    for form in ("cuda", "torch"):
        given = masks.clone().requires_grad_()
        weights = torch_ops.pairwise_affinity(guide, text, form, 1)
        torch_ops.pairwise_step(given, weights, None, text, form, 1).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_launches_nothing(cases, driver):
    masks, guide = torch.empty(0, 3, 4, 5), torch.empty(0, 3, 4, 5)
    cuda_form.refine(cases["par"], masks, guide, None, torch.empty_like(masks))
    assert driver.launches == []


def test_a_refusal_is_an_error_and_takes_the_form_away(driver, monkeypatch):
    driver.refuse = 700
    masks = torch.rand(1, 2, 4, 4)
    with pytest.raises(BackendError, match=r"driver refuses the kernels \(700\)"):
        cuda_form.refine(SMALL, masks, masks, None, torch.empty_like(masks))
    monkeypatch.setattr(cuda_check, "place_of", lambda _: torch.device("cpu"))
    assert "refuses" in cuda_form.check(0)


def test_a_form_that_computes_something_else_is_not_offered(driver, monkeypatch):
    monkeypatch.setattr(cuda_check, "place_of", lambda _: torch.device("cpu"))
    assert cuda_form.check(0) is None
    cuda_form.check.cache_clear()
    step = cuda_form.step
    monkeypatch.setattr(cuda_form, "step", lambda *given: (step(*given), given[-1].add_(0.01)))
    assert "differs" in cuda_form.check(0)


def test_a_gpu_that_the_compiler_does_not_know_gets_ptx(driver, monkeypatch):
    asked = []

    def compiled(parameters, storage, architecture):
        asked.append(architecture)
        if architecture.startswith("sm_"):
            raise BackendError("invalid value for --gpu-architecture")
        return cuda_source.source(parameters).encode()

    monkeypatch.setattr(cuda_source, "ptx", compiled)
    masks = torch.rand(1, 2, 4, 4)
    out = torch.empty_like(masks)
    cuda_form.refine(SMALL, masks, masks, None, out)
    torch.testing.assert_close(out, reference.refine(masks, masks, SMALL), rtol=2e-4, atol=1e-5)
    assert asked == ["sm_90", "compute_80"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(BackendError, match="invalid value"):
        cuda_form.refine(SMALL, masks, masks, None, out)


def test_the_choice_says_why(monkeypatch):
    if not torch.cuda.is_available():
        table = {form.name: form for form in forms()}
        assert not table["cuda"].available
        assert "no CUDA device" in table["cuda"].reason or "not installed" in table["cuda"].reason
        assert choose("auto", is_torch=True, device="cuda:1").name == "torch"
        with pytest.raises(BackendError, match="form 'cuda'"):
            choose("cuda", is_torch=True, device="cuda:0")
    with pytest.raises(UsageError, match="work on 'cuda'"):
        refine(torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4), SMALL, form="cuda")
    monkeypatch.setattr(sys.modules[choose.__module__], "_cuda_obstacle", lambda _: None)
    assert choose("auto", is_torch=True, device="cuda:1", dtype="float16").name == "cuda"
    assert choose("auto", is_torch=True, device="cuda:1", dtype="bfloat16").name == "torch"
    assert choose("cuda", is_torch=True, device="cuda").name == "cuda"
    with pytest.raises(UsageError, match="float64"):
        choose("cuda", is_torch=True, device="cuda", dtype="float64")
    with pytest.raises(UsageError, match="on cuda"):
        choose("cpu", is_torch=True, device="cuda")


def test_choosing_for_arrays_does_not_import_torch():
    code = (
        "import sys\nfrom wsss_deploy.pairwise import choose\nchoose('auto', is_torch=False)\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ptx"


def test_the_cache_keeps_whole_programs_only(cache):
    name = ptx_cache.key("source", "option")
    assert name != ptx_cache.key("sourceo", "ption")
    assert ptx_cache.read(name) is None
    ptx_cache.write(name, b"code\nof two lines")
    assert ptx_cache.read(name) == b"code\nof two lines"
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damaged in (b"", content[:-1], content[:20], content + b" "):
        file.write_bytes(damaged)
        assert ptx_cache.read(name) is None
    assert file.read_bytes().startswith(b"// sha256 ")


def test_a_folder_that_cannot_be_written_is_no_error(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the folder's place")
    ptx_cache.write("0", b"code")
    assert ptx_cache.read("0") is None


WRITER = """
from wsss_deploy.pairwise import ptx_cache
for _ in range(20):
    ptx_cache.write("name", b"x" * 200_000)
"""


def test_processes_that_write_at_once_never_show_a_part(cache):
    code = b"x" * 200_000
    writers = [subprocess.Popen([sys.executable, "-c", WRITER]) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(ptx_cache.read("name"))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen <= {None, code}
    assert ptx_cache.read("name") == code
    assert [path.name for path in cache.iterdir()] == ["name.ptx"]


def test_nvrtc_runs_once_for_a_program(cache, cases, monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings with NVRTC")
    text = cuda_source.source(cases["par"])
    first = cuda_source.compile_program(text, "pairwise.cu")
    assert b".entry wsss_pairwise_step" in first
    assert b"\0" not in first, "an assembler stops there"
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *_: pytest.fail("compiled again"))
    assert cuda_source.compile_program(text, "pairwise.cu") == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [67, 68])
def test_on_a_gpu(case, scene, dtype, width):
    data = scene(classes=11, height=41, width=width)
    masks, guide = (torch.from_numpy(array).to("cuda", dtype) for array in (data.masks, data.guide))
    expected = reference.refine(masks.double().cpu(), guide.double().cpu(), case)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert choose("auto", is_torch=True, device="cuda:0").name == "cuda"
    out = refine(masks, guide, case)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    captured = torch.empty_like(masks)
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        cuda_form.refine(case, masks, guide, reference.unary_of(masks, case), captured)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [67, 68])
def test_the_tensorrt_plugins_program_on_a_gpu(case, scene, dtype, width):
    """The PTX that the plugin gives (tests/export/test_tensorrt_plugin.py), with its launch parameters."""
    from cuda.bindings import driver

    if case.mean_field is not None:
        pytest.skip("the plugin has no such form")
    data = scene(classes=11, height=41, width=width)
    masks, guide = (torch.from_numpy(array).to("cuda", dtype) for array in (data.masks, data.guide))
    code = cuda_source.ptx(case, "__half" if dtype == torch.float16 else "float")
    status, module = driver.cuModuleLoadData(code + b"\0")
    if status == driver.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
        pytest.skip("the driver is older than NVRTC's PTX")
    assert status == driver.CUresult.CUDA_SUCCESS

    def launch(kernel, inputs, out):
        status, function = driver.cuModuleGetFunction(module, kernel.encode())
        assert status == driver.CUresult.CUDA_SUCCESS
        batch, channels, height, width = inputs[0].shape
        values = (*(t.data_ptr() for t in inputs), batch, channels, height, width, out.data_ptr())
        kinds = (*[ctypes.c_void_p] * len(inputs), *[ctypes.c_int] * 4, ctypes.c_void_p)
        blocks = -(-batch * height * width // cuda_launch.BLOCK)
        stream = torch.cuda.current_stream().cuda_stream
        size = (blocks, 1, 1, cuda_launch.BLOCK, 1, 1, 0, stream)
        (status,) = driver.cuLaunchKernel(function, *size, (values, kinds), 0)
        assert status == driver.CUresult.CUDA_SUCCESS
        return out

    weights = guide.new_empty(len(guide), len(case.offsets), *guide.shape[2:])
    launch("wsss_pairwise_affinity", [guide], weights)
    out = masks
    for _ in range(case.iterations):
        out = launch("wsss_pairwise_step", [out, weights], torch.empty_like(out))
    expected = reference.refine(masks.double().cpu(), guide.double().cpu(), case)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
