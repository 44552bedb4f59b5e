"""The repository by Triton's own schema, and the client over a real gRPC connection to a small stand-in server."""

from __future__ import annotations

import re
from concurrent import futures

import numpy as np
import onnxruntime
import pytest
import yaml

from export.patterns import pattern_image
from export.triton import config_text, write_repository
from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card
from wsss_deploy.card import ModelCard, Sizing
from wsss_deploy.errors import BackendError, ExportError, UsageError

pytestmark = pytest.mark.timeout(900)  # as in test_contract.py


def parse(text):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def test_the_repository(exported, tmp_path):
    folder = write_repository(exported() / "model.onnx", tmp_path / "models", "roads", max_batch=4, instances=2)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["1", "1/model.onnx", "config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == (exported() / "model.onnx").read_bytes()
    config = parse((folder / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("roads", "onnxruntime_onnx", 4)
    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    # Triton adds the batch; the rest has to be what the graph says.
    for ports, graph in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [port.name for port in ports] == [port.name for port in graph]
        for port, real in zip(ports, graph, strict=True):
            assert list(port.dims) == [side if isinstance(side, int) else -1 for side in real.shape[1:]]
    assert config.instance_group[0].count == 2
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    warmup = config.model_warmup[0].inputs["image"]
    assert warmup.zero_data
    served = ModelCard.from_plain(config.parameters["wsss_card"].string_value, "config")
    assert served == read_card(exported() / "model.onnx")


def test_a_second_export_is_the_next_version(exported, tmp_path):
    for _ in range(2):
        folder = write_repository(exported() / "model.onnx", tmp_path, "roads")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "config.pbtxt"]


def test_an_engine_has_the_other_platform(tiny_card):
    name = 'quote " back \\ umlaut ä \U0001f600 and joiner \u200d'
    config = parse(config_text(tiny_card.model_copy(update={"name": name}), "m", ".engine", max_batch=1))
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert not config.HasField("dynamic_batching")
    assert ModelCard.from_plain(config.parameters["wsss_card"].string_value, "").name == name


def test_what_cannot_be_written(exported, tmp_path):
    model = exported() / "model.onnx"
    for wrong in ("", "a/b", "../x", ".hidden"):
        with pytest.raises(UsageError, match="model name"):
            write_repository(model, tmp_path, wrong)
    with pytest.raises(UsageError, match="instances is 0"):
        write_repository(model, tmp_path, "m", instances=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(ExportError, match="is no Triton model"):
        write_repository(model, tmp_path, "mine")
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(ExportError, match="cannot be written"):
        write_repository(model, tmp_path / "blocked", "m")


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """A gRPC server that reads the repository and answers from ONNX Runtime."""
    grpc = pytest.importorskip("grpc", reason="needs tritonclient[grpc]")
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    wire = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
    folder = write_repository(exported() / "model.onnx", tmp_path_factory.mktemp("models"), "roads")
    config = parse((folder / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")

    class Service(wire.GRPCInferenceServiceServicer):
        asked: list[str] = []  # noqa: RUF012 (of the test)

        def ModelConfig(self, request, context):
            if request.name != "roads":
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")
            return service.ModelConfigResponse(config=config)

        def ModelInfer(self, request, context):
            (port,) = request.inputs
            assert (port.name, port.datatype) == ("image", "UINT8")
            image = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(port.shape)
            names = [item.name for item in request.outputs]
            self.asked.extend(names)
            answer = service.ModelInferResponse(model_name="roads")
            for name, array in zip(names, session.run(names, {"image": image}), strict=True):
                kind = "FP32" if array.dtype == np.float32 else "UINT8"
                answer.outputs.add(name=name, datatype=kind, shape=array.shape)
                answer.raw_output_contents.append(array.tobytes())
            return answer

    running = grpc.server(futures.ThreadPoolExecutor(2))
    wire.add_GRPCInferenceServiceServicer_to_server(Service(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}", Service.asked
    running.stop(None)


def test_the_client_gives_what_the_segmenter_gives(server, exported):
    from wsss_deploy.triton_client import TritonSegmenter

    address, asked = server
    asked.clear()  # the server is the module's
    remote = TritonSegmenter(address, "roads")
    local = Segmenter(exported() / "model.onnx", device="cpu")
    assert remote.card == local.card
    for shape in ((96, 64), (200, 150)):  # the first as it is, the second resized
        image = pattern_image(*shape, 3)
        result, expected = remote.predict(image), local.predict(image)
        np.testing.assert_array_equal(result.mask, expected.mask)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6)
    assert asked == ["mask", "scores"]


def test_the_client_cuts_what_the_card_cuts(server, exported):
    from wsss_deploy.triton_client import TritonSegmenter

    remote = TritonSegmenter(server[0], "roads")
    sizing = Sizing(long_side=48, tile=64, overlap=16)
    remote._card = remote.card.model_copy(update={"sizing": sizing})
    local = Segmenter(exported() / "model.onnx", device="cpu", sizing=sizing)
    for shape in ((50, 64), (100, 150)):  # the first as it is, the second cut
        image = pattern_image(*shape, 3)
        result, expected = remote.predict(image), local.predict(image)
        np.testing.assert_array_equal(result.mask, expected.mask)
    np.testing.assert_allclose(result.confidence, expected.confidence, atol=1e-5)


def test_a_server_that_fails_is_one_line(server):
    from wsss_deploy.triton_client import TritonSegmenter

    with pytest.raises(BackendError, match=r"model 'cats' on .*unknown model"):
        TritonSegmenter(server[0], "cats")
    with pytest.raises(BackendError, match="check the server's address"):
        TritonSegmenter("127.0.0.1:9", "roads", timeout=1)


def test_the_manifests_in_the_document_are_yaml(request):
    text = (request.config.rootpath / "docs" / "triton.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    kinds = [part["kind"] for block in blocks for part in yaml.safe_load_all(block)]
    assert kinds == ["Deployment", "Service", "HorizontalPodAutoscaler"]


def test_sizing_reaches_the_warm_up(tiny_card):
    card = tiny_card.model_copy(update={"sizing": Sizing(long_side=320)})
    assert list(parse(config_text(card, "m", ".onnx")).model_warmup[0].inputs["image"].dims) == [240, 320, 3]
