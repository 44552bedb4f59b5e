"""The exported nodes on ONNX Runtime, with the functions' bodies, against the reference."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

ort = pytest.importorskip("onnxruntime")

from export.onnx_functions import attach_functions, translation_table  # noqa: E402
from wsss_deploy.errors import ExportError  # noqa: E402
from wsss_deploy.pairwise import (  # noqa: E402
    GaussianTerm,
    MeanField,
    PairwiseParameters,
    affinity,
    numpy_form,
    refine,
)


def graph(parameters: PairwiseParameters, opset: int) -> onnx.ModelProto:
    """image, masks -> refined, as bare nodes."""
    attributes = {"domain": "wsss", "parameters": parameters.to_json(), "plugin_namespace": "wsss", "aot": 1}
    nodes = [helper.make_node("PairwiseAffinity", ["guide"], ["weights"], **attributes)]
    unary = ["unary"] if parameters.mean_field else []
    last = "masks"
    for step in range(parameters.iterations):
        name = "out" if step + 1 == parameters.iterations else f"masks{step}"
        nodes.append(helper.make_node("PairwiseStep", [last, "weights", *unary], [name], **attributes))
        last = name
    sizes = ["N", None, "H", "W"]

    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    inputs = [value(name) for name in ("guide", "masks", *unary)]
    body = helper.make_graph(nodes, "refine", inputs, [value("out")])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("wsss", 1)]
    return helper.make_model(body, opset_imports=imports, ir_version=10)


def session(model: onnx.ModelProto):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_bodies_equal_the_reference_at_every_size(case, scene, opset):
    model = graph(case, opset)
    attach_functions(model, case)
    onnx.checker.check_model(model)
    run = session(model)
    for batch, height, width in ((1, 16, 16), (2, 9, 31), (3, 5, 1)):
        data = scene(batch=batch, height=height, width=width, dtype=np.float32)
        feeds = {"guide": data.guide, "masks": data.masks}
        if case.mean_field:
            feeds["unary"] = numpy_form.unary_of(data.masks, case)
        (out,) = run.run(None, feeds)
        expected = refine(data.masks.astype(np.float64), data.guide.astype(np.float64), case)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_published_vectors(vector):
    parameters, data = vector
    guide = data["imgs"].astype(np.float32)
    masks = numpy_form.resize(data["masks"].astype(np.float32), *guide.shape[2:])
    model = graph(parameters, 20)
    attach_functions(model, parameters)
    (out,) = session(model).run(None, {"guide": guide, "masks": masks})
    expected = data["out_f64"]
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_guides_at_the_end_of_the_numbers():
    """A channel whose neighbours are all the same, one whose neighbours nearly are; Gaussians that are hardly any."""
    rng = np.random.default_rng(5)
    guide = rng.random((1, 3, 9, 9)).astype(np.float32)
    guide[:, 0] = np.float32(0.01) + rng.integers(0, 2, (9, 9)).astype(np.float32) * np.float32(2e-9)
    guide[:, 1] = 0.3
    guide[:, :2, 4, 4] = 1.0
    term = GaussianTerm(sigma_rgb=0.1)
    cases = [(guide, PairwiseParameters(kind=kind, dilations=(1, 2), iterations=2)) for kind in ("par", "varm")]
    for value in (1.2, 1.33, 1.36):
        lone = np.zeros((1, 3, 9, 9), np.float32)
        lone[:, 0, 4, 4] = value
        options = {"kind": "gaussian", "dilations": (1,), "terms": (term,), "normalise": True, "iterations": 1}
        cases.append((lone, PairwiseParameters(**options)))
    masks = rng.random((1, 2, 9, 9)).astype(np.float32)
    for image, parameters in cases:
        model = graph(parameters, 20)
        attach_functions(model, parameters)
        (out,) = session(model).run(None, {"guide": image, "masks": masks})
        np.testing.assert_allclose(out, numpy_form.refine(masks, image, parameters), rtol=1e-3, atol=1e-4)


def test_torch_exports_the_nodes(scene):
    parameters = PairwiseParameters(dilations=(1, 2), iterations=2)

    class Network(torch.nn.Module):
        def forward(self, guide):
            return refine(torch.softmax(guide * 3, 1), guide, parameters)

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        Network(),
        (torch.rand(2, 3, 8, 9),),
        dynamo=True,
        opset_version=20,
        custom_translation_table=translation_table(),
        dynamic_shapes={"guide": {0: dynamic, 2: dynamic, 3: dynamic}},
        verbose=False,
    )
    model = program.model_proto
    attach_functions(model, parameters)
    onnx.checker.check_model(model)
    nodes = [node for node in model.graph.node if node.domain == "wsss"]
    assert [node.op_type for node in nodes] == ["PairwiseAffinity", "PairwiseStep", "PairwiseStep"]
    assert {"plugin_namespace", "aot", "parameters"} <= {item.name for item in nodes[0].attribute}
    run = session(model)
    for shape in ((1, 3, 12, 7), (3, 3, 5, 20)):
        guide = torch.rand(shape)
        (out,) = run.run(None, {run.get_inputs()[0].name: guide.numpy()})
        np.testing.assert_allclose(out, Network()(guide), rtol=1e-4, atol=1e-5)


def test_a_gaussian_of_the_position_alone_has_the_batch_of_its_guide():
    parameters = PairwiseParameters(kind="gaussian", radius=1, terms=(GaussianTerm(sigma_xy=3.0),), iterations=1)
    model = graph(parameters, 18)
    attach_functions(model, parameters)
    model.graph.output.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["N", None, "H", "W"]))
    masks, guide = np.full((2, 3, 7, 5), 0.5, np.float32), np.zeros((2, 3, 7, 5), np.float32)
    _, weights = session(model).run(None, {"masks": masks, "guide": guide})
    np.testing.assert_allclose(weights, affinity(guide, parameters), rtol=1e-6)


def test_mean_field_steps_are_no_plugins(scene):
    """TensorRT's plugin takes two inputs, these have three."""
    terms = (GaussianTerm(sigma_rgb=0.1),)
    parameters = PairwiseParameters(kind="gaussian", radius=1, terms=terms, iterations=1, mean_field=MeanField())
    data = scene(dtype=np.float32, height=8, width=9)
    arrays = (torch.from_numpy(data.masks), torch.from_numpy(data.guide))

    class Model(torch.nn.Module):
        def forward(self, masks, guide):
            return refine(masks, guide, parameters, form="torch")

    table = translation_table()
    program = torch.onnx.export(Model().eval(), arrays, dynamo=True, custom_translation_table=table, verbose=False)
    nodes = {node.op_type: {item.name for item in node.attribute} for node in program.model_proto.graph.node}
    assert "plugin_namespace" in nodes["PairwiseAffinity"]
    assert "plugin_namespace" not in nodes["PairwiseStep"]


def test_functions_of_other_parameters_are_refused():
    model = graph(PairwiseParameters(dilations=(1,), iterations=1), 20)
    with pytest.raises(ExportError, match="one refinement a model"):
        attach_functions(model, PairwiseParameters(dilations=(2,), iterations=1))
