from __future__ import annotations

import sys

import numpy as np
import pytest

from wsss_deploy import Segmenter
from wsss_deploy.artifact import save_model
from wsss_deploy.backends import can_run
from wsss_deploy.errors import ArtifactError, BackendError, UsageError

torch = pytest.importorskip("torch")


def hide(monkeypatch, *modules):
    """Make modules look as if they were not installed."""
    import wsss_deploy.backends as backends

    find = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name in modules else find(name))
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_what_can_run_and_why_not(monkeypatch):
    assert can_run("torch").available
    assert torch.__version__.split("+")[0] in can_run("torch").reason
    hide(monkeypatch, "timm", "onnxruntime")
    assert can_run("torch") == (False, can_run("torch").reason)
    assert "timm not installed; pip install 'wsss-deploy[train]'" in can_run("torch").reason
    assert "'wsss-deploy[cpu]'" in can_run("onnxruntime").reason
    assert "'wsss-deploy[gpu]'" in can_run("onnxruntime").reason
    with pytest.raises(UsageError, match="known are onnxruntime, openvino, tensorrt, torch"):
        can_run("caffe")


def test_first_use_without_a_runtime_says_what_to_install(monkeypatch, color_onnx, tiny_model):
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(BackendError, match=r"pip install 'wsss-deploy\[cpu\]' or.*'wsss-deploy\[gpu\]'"):
        Segmenter(color_onnx)
    with pytest.raises(BackendError, match=r"torch not installed; pip install 'wsss-deploy\[train\]'"):
        Segmenter(tiny_model)


def test_backend_must_fit_the_file(color_onnx, tiny_model):
    with pytest.raises(BackendError, match=r"backend torch runs \.pt files"):
        Segmenter(color_onnx, backend="torch")
    with pytest.raises(BackendError, match=r"backend onnxruntime runs \.onnx files"):
        Segmenter(tiny_model, backend="onnxruntime")
    with pytest.raises(BackendError, match=r"backend tensorrt runs \.engine files"):
        Segmenter(tiny_model, backend="tensorrt")
    with pytest.raises(UsageError, match="unknown backend 'caffe'"):
        Segmenter(tiny_model, backend="caffe")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:1", ""])
def test_unknown_devices(device, color_onnx, color_network, color_card):
    with pytest.raises(UsageError, match="known are auto, cpu, cuda"):
        Segmenter(color_onnx, device=device)
    with pytest.raises(UsageError, match="known are auto, cpu, cuda"):
        Segmenter.from_network(color_network, color_card, device=device)


def test_threads(color_onnx):
    pytest.importorskip("onnxruntime")
    assert Segmenter(color_onnx, device="cpu", threads=2).describe()["threads"] == 2
    with pytest.raises(UsageError, match="0 threads"):
        Segmenter(color_onnx, threads=0)


def test_cuda_by_name_fails_where_it_does_not_work(color_onnx, tiny_model):
    pytest.importorskip("onnxruntime")
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    for model in (color_onnx, tiny_model):
        with pytest.raises(BackendError, match="'cuda' was asked for, but"):
            Segmenter(model, device="cuda")
        told = Segmenter(model, device="auto").describe()
        assert told["device"] == "cpu"
        assert "CUDA does not work: " in told["device_reason"]


class FakeSession:
    """A session of a build with CUDA on a machine without it: it silently takes the CPU."""

    def __init__(self, path, options, providers):
        self.providers = [item for item in providers if item == "CPUExecutionProvider"]

    def get_providers(self):
        return self.providers

    def get_inputs(self):
        return [type("Input", (), {"name": "image", "type": "tensor(uint8)"})]

    def get_outputs(self):
        return [type("Output", (), {"name": "scores", "shape": ["n", 3, "h", "w"]})]


def test_a_provider_that_was_asked_for_and_not_given_is_an_error(monkeypatch, color_onnx):
    onnxruntime = pytest.importorskip("onnxruntime")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    with pytest.raises(BackendError, match="the session got CPUExecutionProvider"):
        Segmenter(color_onnx, device="cuda")
    told = Segmenter(color_onnx, device="auto").describe()
    assert told["device"] == "cpu"
    assert "the session got CPUExecutionProvider" in told["device_reason"]


def test_only_a_provider_that_computes_counts(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    from wsss_deploy.backends.onnxruntime_backend import probe_providers

    real = onnxruntime.InferenceSession
    assert probe_providers()["CPUExecutionProvider"] is None

    class Session(real):
        def __init__(self, content, options, providers, **rest):
            if providers == ["BrokenExecutionProvider"]:
                raise RuntimeError("no kernel image is available\nmore")
            self.wrong = providers == ["WrongExecutionProvider"]
            super().__init__(content, None, providers=["CPUExecutionProvider"], **rest)
            self.named = providers if providers != ["SilentExecutionProvider"] else ["CPUExecutionProvider"]

        def get_providers(self):
            return self.named

        def run(self, names, inputs):
            return [output + self.wrong for output in super().run(names, inputs)]

    names = [f"{kind}ExecutionProvider" for kind in ("Broken", "Wrong", "Silent", "Good", "CPU")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    broken, wrong, silent, *good = probe_providers().values()
    assert broken == "no kernel image is available"
    assert "wrong results" in wrong
    assert "cannot be loaded" in silent
    assert good == [None, None]


def test_onnx_of_another_contract(tmp_path, onnx_bytes, color_card):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(color_card, input_name="pixels"))
    with pytest.raises(ArtifactError, match=r"model\.onnx: found inputs .*pixels.*expected input 'image'"):
        Segmenter(path, device="cpu")


def test_a_graph_with_other_classes_than_its_card(tmp_path, onnx_bytes, color_card):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    names, palette = (*color_card.classes, "more"), (*color_card.palette, (1, 2, 3))
    path.write_bytes(onnx_bytes(color_card.model_copy(update={"classes": names, "palette": palette})))
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: its graph gives 3 classes, its card names 4; export it again"
    ):
        Segmenter(path, device="cpu")


def test_onnx_graph_that_does_not_load(tmp_path, onnx_bytes, color_card):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(color_card).replace(b"Softmax", b"Sigmoid"))
    with pytest.raises(ArtifactError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        Segmenter(path, device="cpu")


def test_tensors_that_do_not_fit_the_card(tmp_path, tiny_card, tiny_network):
    state_dict = dict(tiny_network.state_dict())
    first = next(iter(state_dict))
    path = tmp_path / "model.pt"
    for changed, expected in (
        ({name: value for name, value in state_dict.items() if name != first}, f"lacks {first}"),
        ({**state_dict, "extra": torch.zeros(1)}, "unknown extra"),
        ({**state_dict, first: torch.zeros(7, 7)}, r"has shape \(7, 7\) for"),
        ({}, "and .* more"),
    ):
        save_model(path, tiny_card, changed)
        with pytest.raises(ArtifactError, match=expected) as raised:
            Segmenter(path, device="cpu")
        raised.match(r"model\.pt: its tensors do not fit the architecture test_vit")


@pytest.mark.gpu
def test_cuda_gives_the_cpus_masks(tiny_model):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cuda, cpu = Segmenter(tiny_model, device="cuda"), Segmenter(tiny_model, device="cpu")
    assert cuda.describe()["device"] == "cuda:0"
    np.testing.assert_allclose(cuda.predict(image).scores, cpu.predict(image).scores, atol=2e-3)
