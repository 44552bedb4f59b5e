"""Graphs that refine by themselves: the operator's nodes, their bodies, and the same result as torch."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.onnx_graph import export_onnx
from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model, read_card, save_model
from wsss_deploy.card import Refinement
from wsss_deploy.errors import UsageError
from wsss_deploy.networks import DeployedNetwork, RefinedNetwork, restore_network
from wsss_deploy.pairwise import GaussianTerm, MeanField, PairwiseParameters
from wsss_deploy.refinement import DEFAULT

pytestmark = pytest.mark.timeout(900)

TERMS = (GaussianTerm(sigma_rgb=0.1), GaussianTerm(weight=0.2, sigma_xy=3.0))
# One of each kind of body, and one opset each; None takes the package's default.
CASES = {
    18: Refinement(
        parameters=PairwiseParameters(kind="gaussian", dilations=(1, 3), iterations=2, normalise=True, terms=TERMS),
        guide="opponent",
    ),
    20: None,
    23: Refinement(
        parameters=PairwiseParameters(
            kind="varm", dilations=(1, 2), iterations=2, normalise=True, mean_field=MeanField(compatibility=3.0)
        )
    ),
}


@pytest.fixture(scope="module")
def refined(tmp_path_factory, write):
    """Call with an opset; gives the folder with model.pt, model.onnx (refines) and parity.json."""
    ready = {}

    def get(opset):
        if opset not in ready:
            folder = ready[opset] = tmp_path_factory.mktemp(f"refined{opset}")
            card, state_dict = load_model(write(folder / "model.pt", "test_vit"))
            save_model(folder / "model.pt", card.model_copy(update={"refinement": CASES[opset]}), state_dict)
            export_onnx(folder / "model.pt", folder, opset=opset, refine=True)
        return ready[opset]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("opset", CASES)
def test_bytes_are_at_the_edges_alone(refined, bytes_within, opset):
    # The guide is made of the image too.
    assert bytes_within(onnx.load(refined(opset) / "model.onnx")) == []


@pytest.mark.slow
@pytest.mark.parametrize("opset", CASES)
def test_any_batch_and_size_agrees_with_torch(refined, opset):
    folder = refined(opset)
    card, state_dict = load_model(folder / "model.pt")
    refinement = CASES[opset] or DEFAULT
    deployed = DeployedNetwork(restore_network(card, state_dict, "model.pt"), card.preprocessing)
    reference = RefinedNetwork(deployed, refinement)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1), (3, 32, 64), (2, 37, 91), (1, 7, 100), (1, 50, 5)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        image[:, : shape[1] // 2] = (90, 160, 40)
        scores, mask = session.run(["scores", "mask"], {"image": image})
        with torch.no_grad():
            expected, expected_mask = reference(torch.from_numpy(image))
            plain, _ = deployed(torch.from_numpy(image))
        np.testing.assert_allclose(scores, expected.numpy(), atol=2e-4)
        np.testing.assert_allclose(scores.sum(1), 1, atol=1e-4)
        assert (mask == expected_mask.numpy()).mean() > 0.999
        assert np.array_equal(mask, scores.argmax(axis=1))
        assert min(shape[1:]) == 1 or np.abs(scores - plain.numpy()).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("opset", CASES)
def test_the_nodes_and_their_bodies(refined, opset):
    model = onnx.load(refined(opset) / "model.onnx")
    refinement = CASES[opset] or DEFAULT
    nodes = [node for node in model.graph.node if node.domain == "wsss"]
    steps = ["PairwiseStep"] * refinement.parameters.iterations
    assert [node.op_type for node in nodes] == ["PairwiseAffinity", *steps]
    for node in nodes:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        # The plugin takes no unary term.
        plugin = refinement.parameters.mean_field is None or node.op_type == "PairwiseAffinity"
        assert (attributes.get("plugin_namespace"), attributes.get("aot")) == ((b"wsss", 1) if plugin else (None, None))
        assert PairwiseParameters.model_validate_json(attributes["parameters"]) == refinement.parameters
    assert {function.name for function in model.functions} == {"PairwiseAffinity", "PairwiseStep"}
    assert {(item.domain, item.version) for item in model.opset_import} == {("", opset), ("wsss", 1)}


@pytest.mark.slow
def test_the_segmenter_runs_it_as_it_is(refined):
    folder = refined(20)
    card = read_card(folder / "model.onnx")
    assert card.refinement == DEFAULT.model_copy(update={"in_graph": True})
    assert json.loads((folder / "parity.json").read_text())["verdict"] == "passed"
    inside = Segmenter(folder / "model.onnx", device="cpu")
    outside = Segmenter(folder / "model.pt", device="cpu", refine=True)
    image = np.random.default_rng(1).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    ours, theirs = inside.predict(image), outside.predict(image)
    np.testing.assert_allclose(ours.network_scores, theirs.network_scores, atol=2e-4)
    assert ours.timing["refinement"] == 0 < theirs.timing["refinement"]
    assert inside.describe()["refinement"]["form"] == "graph"
    assert inside.describe()["refinement"]["summary"] == outside.describe()["refinement"]["summary"]
    with pytest.raises(UsageError, match="inside its graph"):
        Segmenter(folder / "model.onnx", device="cpu", refine=False)
