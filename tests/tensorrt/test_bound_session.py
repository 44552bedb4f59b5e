"""ONNX Runtime with bound buffers and refinement on the device: a device of host memory, kernels compiled as C++.

What is real: ONNX Runtime, its binding to addresses, the kernels' code, the order of copies and launches. What is not:
CUDA, its memory and its streams; `test_on_a_gpu` has not been run.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from benchmarks.gpu_check import Machine, photograph_rows
from export.patterns import pattern_image
from wsss_deploy import Segmenter
from wsss_deploy import segmenter as segmenter_module
from wsss_deploy.backends import device_mask, device_refinement, onnxruntime_backend
from wsss_deploy.backends.base import NOT_FINITE
from wsss_deploy.backends.bound_session import BoundSession
from wsss_deploy.backends.device_lane import DeviceLane
from wsss_deploy.backends.device_mask import DeviceMasks, parted
from wsss_deploy.backends.device_refinement import DeviceRefinement
from wsss_deploy.backends.onnxruntime_backend import OnnxRuntimeBackend
from wsss_deploy.card import Refinement, Sizing
from wsss_deploy.errors import ArtifactError, BackendError, OutOfMemoryError
from wsss_deploy.pairwise import GaussianTerm, PairwiseParameters, cuda_form, cuda_source
from wsss_deploy.pairwise.cuda_guide import make_guide_at
from wsss_deploy.pairwise.cuda_launch import Place
from wsss_deploy.pairwise.guides import make_guide
from wsss_deploy.refinement import DEFAULT, STRONG, Refiner
from wsss_deploy.upsampling import best_class, upsample

MASKS = device_mask.mask_source()
PAR = PairwiseParameters(dilations=(1, 2), iterations=2, normalise=True)


@pytest.fixture
def cuda(monkeypatch, layer, driver):
    """ONNX Runtime as it would be on a GPU, on a device of host memory; gives what was opened."""
    opened = []

    class Session:
        def __init__(self, path, options, providers):
            opened.append(providers)
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, name):
            return getattr(self.session, name)

        def disable_fallback(self):
            pass

        def __del__(self):
            layer.events.append("session ends")

        def get_providers(self):
            return [provider if isinstance(provider, str) else provider[0] for provider in opened[-1]]

    class Bound(BoundSession):
        def __init__(self, *given):
            super().__init__(*given, device_type="cpu")

    class Runtime:
        InferenceSession = Session

        def __getattr__(self, name):
            return getattr(onnxruntime, name)

        def get_available_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def preload_dlls(self):
            pass

    monkeypatch.setattr(onnxruntime_backend, "onnxruntime", Runtime())
    monkeypatch.setattr(onnxruntime_backend, "BoundSession", Bound)
    monkeypatch.setattr(onnxruntime_backend, "open_device", lambda index: layer)
    return opened


@pytest.mark.parametrize("kind", ["rgb", "opponent"])
def test_the_guide_is_the_hosts_bit_by_bit(driver, kind):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 33, 3), dtype=np.uint8)
    guide = np.full((2, 3, 9, 33), np.nan, np.float32)
    make_guide_at(Place(0, 7, (9, 0)), kind, images.ctypes.data, (2, 9, 33), guide.ctypes.data)
    np.testing.assert_array_equal(guide, make_guide(images, kind))
    assert [name for name, *_ in driver.launches] == ["run_guide"]


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_steps_on_addresses(driver, layer, iterations):
    settings = Refinement(parameters=PAR.model_copy(update={"iterations": iterations}), guide="opponent")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 9, 33, 3), dtype=np.uint8)
    scores = random.random((2, 4, 9, 33), np.float32)
    scores /= scores.sum(1, keepdims=True)
    expected = Refiner(settings)(scores, images)
    with layer.active():
        refinement = DeviceRefinement(layer, Place(0, 7, (9, 0)), layer.stream(), {})
        for _ in range(2):
            given = scores.copy()
            address = refinement(settings, images.ctypes.data, given.ctypes.data, scores.shape)
            found = np.empty_like(scores)
            layer.download(found, address, None)
            np.testing.assert_allclose(found, expected, atol=2e-4)
    assert layer.allocated == 3, "buffers are kept while the shape stays"
    assert {stream for *_, stream in driver.launches} == {7}


def masks_on_device(layer, scores, sizes):
    with layer.active():
        making = DeviceMasks(layer, Place(0, 7, (9, 0)), layer.stream(), {})
        address = making(scores.ctypes.data, scores.shape, sizes)
        found = np.empty(sum(height * width for height, width in sizes), np.uint8)
        layer.download(found, address, None)
    return parted(found, sizes)


@pytest.mark.parametrize(
    "size", [(1, 1), (13, 17), (26, 34), (61, 17), (13, 90), (7, 9), (2, 3), (40, 5), (3, 120), (400, 300)]
)
def test_masks_of_other_sizes_are_the_hosts(driver, layer, size):
    scores = np.random.default_rng(0).random((2, 6, 13, 17), np.float32)
    for found, each in zip(masks_on_device(layer, scores, [size, size]), scores, strict=True):
        raised = np.sort(upsample(each, *size), axis=0)
        sure = raised[-1] - raised[-2] > 1e-5  # elsewhere rounding may decide
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(found[sure], best_class(each, *size)[0][sure])


def test_masks_of_many_sizes_need_few_launches(driver, layer):
    scores = np.random.default_rng(0).random((5, 3, 8, 8), np.float32)
    sizes = [(16, 16), (16, 16), (5, 7), (5, 7), (16, 16)]
    found = masks_on_device(layer, scores, sizes)
    assert [mask.shape for mask in found] == sizes
    for mask, each in zip(found, scores, strict=True):
        assert (mask == best_class(each, *mask.shape)[0]).mean() > 0.995
    assert [name for name, *_ in driver.launches] == ["run_best_class"] * 3


def test_equal_scores_are_the_lower_class(driver, layer):
    (found,) = masks_on_device(layer, np.full((1, 5, 4, 4), 0.2, np.float32), [(9, 9)])
    assert not found.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (4, 4)])
def test_scores_that_are_not_finite_are_marked(driver, layer, value, size):
    scores = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    scores[0, 2, 1, 2] = value
    (found,) = masks_on_device(layer, scores, [size])
    assert found[size[0] // 8, 2 * size[1] // 8] == NOT_FINITE, "the pixel that lies there"
    assert not (found == NOT_FINITE).all()


def test_only_images_go_up_and_masks_of_their_sizes_come_down(cuda, tiny_onnx, layer):
    sizing = Sizing(long_side=64)
    images = [
        pattern_image(*shape, seed) for seed, shape in enumerate([(48, 64), (96, 128), (30, 40), (96, 128), (90, 20)])
    ]
    for refine in (False, DEFAULT):
        ours, theirs = (Segmenter(tiny_onnx, device=d, refine=refine, sizing=sizing) for d in ("auto", "cpu"))
        assert ours.describe()["masks"] == "on the device"
        assert theirs.describe()["masks"] == "on the host: the scores are in the host's memory"
        layer.uploaded.clear(), layer.downloaded.clear()
        masks = ours.predict_masks(images)
        seen = sorted([3 * 48 * 64 * 3, 64 * 16 * 3] if refine is False else [4 * 48 * 64 * 3, 64 * 16 * 3])
        kept = [48 * 64 * 3] if refine is False else []  # of the network's size: the short way
        assert sorted(layer.uploaded) == sorted(seen + kept)
        assert sum(layer.downloaded) == sum(mask.size for mask in masks)
        for mask, image in zip(masks, images, strict=True):
            assert mask.shape == image.shape[:2]
            assert (mask == theirs.predict(image).mask).mean() > 0.998


def test_the_gpu_check_holds_masks_to_the_device(cuda, tiny_onnx, driver, monkeypatch):
    machine = Machine(torch.device("cpu"))

    def rows():
        found = list(photograph_rows(machine, tiny_onnx, "auto"))
        return [row.name.partition(" raised ")[2] for row in found], [row.ok for row in found]

    on_host = "on the host, by predict_batch"
    assert rows() == ([on_host, "on the device, by predict_masks"], [True, True])
    right = Segmenter.predict_masks
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "predict_masks", lambda self, images: [mask ^ 1 for mask in right(self, images)])
        assert rows()[1] == [True, False]
    driver.refuse = 700
    assert rows() == ([on_host, "on the host, by predict_masks"], [False, False])


def test_masks_of_large_images_are_parted(cuda, tiny_onnx, layer, monkeypatch):
    monkeypatch.setattr(segmenter_module, "MOST_PIXELS", 2 * 90 * 120)
    images = [pattern_image(90, 120, seed) for seed in range(5)] + [pattern_image(200, 160, 5)]
    ours = Segmenter(tiny_onnx, refine=False, sizing=Sizing(long_side=32))
    assert ours.describe()["masks"] == "on the device"  # which compares them once
    layer.downloaded.clear()
    masks = ours.predict_masks(images)
    assert layer.downloaded == [2 * 90 * 120, 2 * 90 * 120, 90 * 120, 4 * 4 * 32 * 32], "the last one by its scores"
    for mask, image in zip(masks, images, strict=True):
        assert (mask == ours.predict(image).mask).mean() > 0.998


def test_masks_without_room_for_refining_take_the_hosts_way(cuda, tiny_onnx, layer):
    ours, theirs = (
        Segmenter(tiny_onnx, device=d, refine=DEFAULT, sizing=Sizing(long_side=64)) for d in ("auto", "cpu")
    )
    assert ours.describe()["masks"] == "on the device"
    image = pattern_image(96, 96, 0)
    layer.most = 4 * 4 * 64 * 64  # the scores fit, the weights do not
    layer.downloaded.clear()
    np.testing.assert_array_equal(ours.predict_masks([image])[0], theirs.predict(image).mask)
    assert layer.downloaded == [4 * 4 * 64 * 64]


def test_damaged_models_are_told_by_their_masks_too(cuda, tiny_onnx, monkeypatch):
    ours = Segmenter(tiny_onnx, refine=False, sizing=Sizing(long_side=32))
    start = DeviceLane.start

    def damaged(self, images, output, shape, dtype, launch, *rest, **more):
        def network(image, found):
            launch(image, found)
            np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 1).from_address(found))[0] = np.nan

        return start(self, images, output, shape, dtype, network, *rest, **more)

    monkeypatch.setattr(DeviceLane, "start", damaged)
    with pytest.raises(ArtifactError, match="not finite"):
        ours.predict_masks([pattern_image(50, 50, 0)])


def test_masks_that_come_out_wrong_on_a_device_are_made_on_the_host(cuda, tiny_onnx, monkeypatch, caplog):
    monkeypatch.setattr(device_mask, "mask_source", lambda: MASKS.replace("score > best", "score < best"))
    ours, theirs = (Segmenter(tiny_onnx, device=d, refine=False, sizing=Sizing(long_side=32)) for d in ("auto", "cpu"))
    assert "% of the pixels differ from the host's" in ours.describe()["masks"]
    image = pattern_image(50, 70, 0)
    np.testing.assert_array_equal(ours.predict_masks([image])[0], theirs.predict(image).mask)
    ours.describe()
    assert caplog.text.count("not on the GPU") == 1


def test_it_gives_what_the_cpu_gives(cuda, tiny_onnx, layer):
    images = [pattern_image(48 + 16 * (seed % 2), 64, seed) for seed in range(4)]
    for refine in (False, DEFAULT, STRONG):
        ours, theirs = Segmenter(tiny_onnx, refine=refine), Segmenter(tiny_onnx, device="cpu", refine=refine)
        for result, expected in zip(ours.predict_batch(images), theirs.predict_batch(images), strict=True):
            np.testing.assert_allclose(result.scores, expected.scores, atol=5e-4)
            assert (result.mask == expected.mask).mean() > 0.999
            assert (result.timing["refinement"] > 0) == (refine is not False)
    plain, other = Segmenter(tiny_onnx, refine=False), Segmenter(tiny_onnx, device="cpu", refine=False)
    for one, right in zip(plain.predict_masks(images), other.predict_masks(images), strict=True):
        np.testing.assert_array_equal(one, right)
    assert cuda[0] == [("CUDAExecutionProvider", {"device_id": 0, "user_compute_stream": "7"}), "CPUExecutionProvider"]
    told = ours.describe()
    assert (told["device"], told["refinement"]["form"]) == ("cuda:0", "cuda")
    assert told["copies"].startswith("bound, page-locked, in one stream with the refinement")
    assert "equals the CPU's form" in told["refinement"]["form_reason"]
    assert theirs.describe()["refinement"]["form"] in ("cpu", "numpy")


def test_only_images_go_up_and_one_output_comes_down(cuda, tiny_onnx, layer):
    image = pattern_image(64, 80, 0)
    segmenter = Segmenter(tiny_onnx, refine=DEFAULT)
    assert layer.uploaded, "the refinement is compared with the CPU's when a model is opened"
    layer.uploaded.clear(), layer.downloaded.clear()
    segmenter.predict(image)
    assert (layer.uploaded, layer.downloaded) == ([64 * 80 * 3], [4 * 4 * 64 * 80])
    plain = Segmenter(tiny_onnx, refine=False)
    layer.uploaded.clear(), layer.downloaded.clear()
    plain.predict_masks([image, image])
    assert (layer.uploaded, layer.downloaded) == ([2 * 64 * 80 * 3], [2 * 64 * 80])


def test_buffers_grow_and_are_kept(cuda, tiny_onnx, layer):
    segmenter = Segmenter(tiny_onnx, refine=DEFAULT)
    segmenter.predict(pattern_image(96, 96, 0))
    before, live = layer.allocated, layer.live
    for shape in ((96, 96), (64, 96), (16, 32), (90, 80)):
        segmenter.predict(pattern_image(*shape, 0))
    assert layer.allocated == before
    segmenter.predict(pattern_image(128, 96, 0))
    assert (layer.allocated, layer.live) == (before + 5, live), "old ones go: image, scores, guide, weights, spare"
    del segmenter
    assert layer.live == 0
    assert [event for event in layer.events if event != "buffer"] == ["session ends", "stream ends"]


@pytest.mark.parametrize("refine", [False, DEFAULT])
def test_threads_get_their_own_results(cuda, tiny_onnx, refine):
    ours, theirs = (Segmenter(tiny_onnx, device=device, threads=1, refine=refine) for device in ("auto", "cpu"))
    images = [pattern_image(32 + 16 * (seed % 3), 64, seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for image, result in zip(images, pool.map(ours.predict, images), strict=True):
            np.testing.assert_allclose(result.scores, theirs.predict(image).scores, atol=5e-4)


def test_the_first_comparison_may_meet_another_threads_work(cuda, tiny_onnx, monkeypatch):
    ours = OnnxRuntimeBackend(tiny_onnx, "cuda")
    theirs = Segmenter(tiny_onnx, device="cpu", refine=False)
    images = [np.stack([pattern_image(64, 96, seed)]) for seed in range(12)]
    settings = [DEFAULT, STRONG] * 6
    expected = [Refiner(s)(theirs.scores_of(list(i)), i) for s, i in zip(settings, images, strict=True)]
    slow = device_refinement.make_guide_at

    def compiling(*given):
        time.sleep(0.02)
        slow(*given)

    monkeypatch.setattr(device_refinement, "make_guide_at", compiling)
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda pair: ours.run(pair[0], Refiner(pair[1])).scores, zip(images, settings, strict=True))
        )
    for one, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, right, atol=5e-4)


def test_what_the_device_cannot_refine_is_refined_by_the_cpu(cuda, tiny_onnx, monkeypatch):
    gaussian = PairwiseParameters(kind="gaussian", radius=1, terms=(GaussianTerm(sigma_rgb=0.2),), normalise=True)
    image = pattern_image(48, 64, 0)
    ours = Segmenter(tiny_onnx, refine=gaussian)
    expected = Segmenter(tiny_onnx, device="cpu", refine=gaussian).predict(image)
    np.testing.assert_array_equal(ours.predict(image).scores, expected.scores)
    told = ours.describe()["refinement"]
    assert told["form"] != "cuda"
    assert "not on the GPU: Gaussian weights" in told["form_reason"]
    right = cuda_form.launch_at

    def wrong(place, program, kernel, inputs, sizes, outputs):
        right(place, program, kernel, inputs, sizes, outputs)
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 1).from_address(outputs[0]))[0] += 1

    monkeypatch.setattr(cuda_form, "launch_at", wrong)
    other = Segmenter(tiny_onnx, refine=DEFAULT)
    assert "differs from the CPU's by" in other.describe()["refinement"]["form_reason"]
    expected = Segmenter(tiny_onnx, device="cpu", refine=DEFAULT).predict(image)
    np.testing.assert_array_equal(other.predict(image).scores, expected.scores)


def test_rows_of_whole_groups_of_four_are_checked_too(driver, layer, monkeypatch):
    right = cuda_source.source
    before = "Storage(total[c].at[pixel])"
    assert before in right(PAR)
    monkeypatch.setattr(cuda_source, "source", lambda *given: right(*given).replace(before, "Storage(0)"))
    with layer.active():
        refinement = DeviceRefinement(layer, Place(0, 7, (9, 0)), layer.stream(), {})
        assert "differs from the CPU's by" in refinement.obstacle(Refinement(parameters=PAR))


def test_a_driver_that_refuses_leaves_it_to_the_cpu(cuda, tiny_onnx, driver):
    driver.refuse = 700
    segmenter = Segmenter(tiny_onnx, refine=DEFAULT)
    assert "driver refuses the kernels (700)" in segmenter.describe()["refinement"]["form_reason"]
    assert segmenter.predict(pattern_image(48, 64, 0)).timing["refinement"] > 0


def test_memory_that_is_short_halves_the_batch(cuda, tiny_onnx, layer):
    segmenter = Segmenter(tiny_onnx, refine=False)
    images = [pattern_image(48, 64, seed) for seed in range(4)]
    expected = [Segmenter(tiny_onnx, device="cpu", refine=False).predict(image).mask for image in images]
    before, layer.most = layer.most, 2 * 48 * 64 * 4 * 4
    for result, mask in zip(segmenter.predict_batch(images), expected, strict=True):
        np.testing.assert_array_equal(result.mask, mask)
    layer.most = 0
    with pytest.raises(OutOfMemoryError, match="use smaller batches"):
        segmenter.predict(pattern_image(200, 100, 0))
    layer.most = before
    segmenter.predict(pattern_image(200, 100, 0))


def test_without_memory_for_refining_the_cpu_refines(cuda, tiny_onnx, layer, caplog):
    segmenter = Segmenter(tiny_onnx, refine=DEFAULT)
    image = pattern_image(64, 96, 0)
    expected = Segmenter(tiny_onnx, device="cpu", refine=DEFAULT).predict(image)
    before, layer.most = layer.most, 4 * 4 * 64 * 96  # the scores fit, the weights do not
    result = segmenter.predict(image)
    np.testing.assert_array_equal(result.scores, expected.scores)
    assert result.timing["refinement"] > 0
    assert "no memory for refining" in caplog.text
    assert segmenter.describe()["refinement"]["form"] == "cuda", "another time there may be room"
    fresh = OnnxRuntimeBackend(tiny_onnx, "cuda")
    layer.most = 0
    assert "cudaErrorMemoryAllocation" in fresh.refinement_form(DEFAULT).reason
    layer.most = before
    assert fresh.refinement_form(DEFAULT).name == "cuda"


def test_without_cuda_bindings_onnxruntime_copies(cuda, tiny_onnx, monkeypatch):
    def missing(index):
        raise BackendError("CUDA needs cuda-bindings or pycuda")

    monkeypatch.setattr(onnxruntime_backend, "open_device", missing)
    segmenter = Segmenter(tiny_onnx, refine=DEFAULT)
    assert cuda == [[("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]]
    told = segmenter.describe()
    assert "by ONNX Runtime, from and to pageable memory: CUDA needs cuda-bindings" in told["copies"]
    assert told["refinement"]["form"] != "cuda"
    assert segmenter.predict(pattern_image(48, 64, 0)).mask.shape == (48, 64)


def test_a_session_that_falls_back_is_not_taken(cuda, tiny_onnx, monkeypatch):
    session = onnxruntime_backend.onnxruntime.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="the session got CPUExecutionProvider; CUDA or cuDNN libraries"):
        Segmenter(tiny_onnx, device="cuda")
    told = Segmenter(tiny_onnx).describe()
    assert told["device"] == "cpu"
    assert "CUDA does not work: the session got CPUExecutionProvider" in told["device_reason"]
    assert told["copies"].startswith("none")

    def broken(index):
        raise BackendError("cuda:0 does not work: no driver")

    monkeypatch.setattr(onnxruntime_backend, "open_device", broken)
    told = Segmenter(tiny_onnx).describe()
    assert told["device_reason"].endswith("cuda:0 does not work: no driver")
    assert told["copies"].startswith("none")


def test_scores_of_another_type_are_not_bound(cuda, half_onnx, layer):
    image = pattern_image(32, 48, 0)
    ours, theirs = Segmenter(half_onnx, refine=False), Segmenter(half_onnx, device="cpu", refine=False)
    np.testing.assert_allclose(ours.predict(image).scores, theirs.predict(image).scores, atol=1e-3)
    assert layer.downloaded == []
    assert ours.describe()["copies"].startswith("by ONNX Runtime where an output is neither")
    refined = Segmenter(half_onnx, refine=DEFAULT).predict(image)
    assert refined.timing["refinement"] > 0
    assert refined.network_scores.dtype == np.float32
    assert "not float32" in ours.runtime.refinement_form(DEFAULT).reason


@pytest.fixture
def half_onnx(tiny_onnx, tmp_path):
    """The model with an output in half precision, as no export writes it."""
    model = onnx.load(tiny_onnx)
    for node in model.graph.node:
        node.output[:] = ["single" if name == "scores" else name for name in node.output]
        node.input[:] = ["single" if name == "scores" else name for name in node.input]
    model.graph.node.append(onnx.helper.make_node("Cast", ["single"], ["scores"], to=onnx.TensorProto.FLOAT16))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    return tmp_path / "half.onnx"


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs ONNX Runtime with CUDA"
)
@pytest.mark.parametrize("refine", [False, DEFAULT])
def test_on_a_gpu(tiny_onnx, refine):
    ours, theirs = Segmenter(tiny_onnx, device="cuda", refine=refine), Segmenter(tiny_onnx, "cpu", refine=refine)
    assert ours.describe()["copies"].startswith("bound")
    images = [pattern_image(*shape, seed) for seed, shape in enumerate(((64, 64), (64, 64), (100, 37), (16, 200)) * 4)]
    expected = [theirs.predict(image).scores for image in images]
    with ThreadPoolExecutor(4) as pool:
        for result, scores in zip(pool.map(ours.predict, images), expected, strict=True):
            np.testing.assert_allclose(result.scores, scores, atol=1e-2)  # the provider multiplies in TF32
    for result, scores in zip(ours.predict_batch(images), expected, strict=True):
        np.testing.assert_allclose(result.scores, scores, atol=1e-2)
    if refine is not False:
        assert ours.describe()["refinement"]["form"] == "cuda"
