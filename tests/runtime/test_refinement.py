"""Refinement in the runtime: who decides, what runs, and that all ways give the same scores."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card, save_model
from wsss_deploy.card import ModelCard, Refinement
from wsss_deploy.cli.doctor import main as doctor
from wsss_deploy.cli.predict import main as predict
from wsss_deploy.errors import ArtifactError, UsageError
from wsss_deploy.pairwise import GaussianTerm, MeanField, PairwiseParameters, forms, native, numpy_form
from wsss_deploy.pairwise.guides import make_guide
from wsss_deploy.refinement import DEFAULT, Refiner, decide

torch = pytest.importorskip("torch")

PAR = PairwiseParameters(dilations=(1, 2), iterations=3, normalise=True)
GAUSSIAN = PairwiseParameters(
    kind="gaussian", dilations=(1, 3), iterations=2, normalise=True, terms=(GaussianTerm(sigma_rgb=0.1),)
)
OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [1 / 2, 1 / 2, -1]])
VARIANTS = {
    "par": Refinement(parameters=PAR),
    "gaussian-opponent": Refinement(parameters=GAUSSIAN, guide="opponent"),
    "mean-field": Refinement(parameters=GAUSSIAN.model_copy(update={"mean_field": MeanField(compatibility=2.0)})),
    "default": DEFAULT,
}


@pytest.fixture(params=VARIANTS)
def refinement(request) -> Refinement:
    return VARIANTS[request.param]


@pytest.fixture
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    image = np.full((45, 61, 3), (200, 80, 60), np.uint8)
    image[:, 30:] = (70, 180, 90)
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def reference(scores: np.ndarray, image: np.ndarray, refinement: Refinement) -> np.ndarray:
    """The refinement in float64."""
    guide = image / 255
    if refinement.guide == "opponent":
        guide = guide @ OPPONENT.T
    refined = numpy_form.refine(scores[None].astype(np.float64), guide.transpose(2, 0, 1)[None], refinement.parameters)
    return refined[0]


def test_the_guides_are_the_same_bits_in_both_libraries_and_for_equal_colours():
    image = np.random.default_rng(0).integers(0, 256, (2, 9, 31, 3), dtype=np.uint8)
    image[0, :, :4], image[0, :, 4:8], image[0, :, 8] = 0, 255, (1, 2, 3)
    for kind, expected in (("rgb", image / 255), ("opponent", image / 255 @ OPPONENT.T)):
        ours = make_guide(image, kind)
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        np.testing.assert_allclose(ours, expected.transpose(0, 3, 1, 2), atol=1e-6)
        np.testing.assert_array_equal(make_guide(torch.from_numpy(image), kind), ours)
        flat = make_guide(np.full((1, 37, 53, 3), (17, 201, 93), np.uint8), kind)
        assert (flat == flat[:, :, :1, :1]).all()


def test_both_runtimes_give_the_references_scores(refinement, photo, color_network, color_card, color_onnx):
    pytest.importorskip("onnxruntime")
    plain = Segmenter.from_network(color_network, color_card).predict(photo)
    expected = reference(plain.network_scores, photo, refinement)
    assert np.abs(expected - plain.network_scores).max() > 0.01
    for model in (
        Segmenter.from_network(color_network, color_card, refine=refinement),
        Segmenter(color_onnx, device="cpu", refine=refinement, threads=1),
    ):
        result = model.predict(photo)
        np.testing.assert_allclose(result.network_scores, expected, atol=2e-4)
        np.testing.assert_allclose(result.scores.sum(0), 1, atol=1e-4)
        np.testing.assert_array_equal(result.mask, result.scores.argmax(0))
        np.testing.assert_array_equal(result.confidence, result.scores.max(0))
        assert result.timing["refinement"] > 0
        assert result.timing["inference"] > 0


def test_a_batch_refines_as_its_images_alone(photo, color_onnx):
    pytest.importorskip("onnxruntime")
    model = Segmenter(color_onnx, device="cpu", refine=True)
    images = [photo, photo[:, ::-1].copy(), photo[:20]]
    for image, result in zip(images, model.predict_batch(images), strict=True):
        np.testing.assert_array_equal(result.network_scores, model.predict(image).network_scores)


def test_it_removes_noise_and_keeps_the_edge(color_network, color_card, photo):
    noisy = photo.copy()
    noisy[20, 10] = (70, 180, 90)  # a lone pixel of the other class
    plain = Segmenter.from_network(color_network, color_card).predict(noisy)
    refined = Segmenter.from_network(color_network, color_card, refine=PAR).predict(noisy)
    assert plain.mask[20, 10] == 1
    assert refined.mask[20, 10] == 0
    assert (refined.mask[:, :29] == 0).all()
    assert (refined.mask[:, 31:] == 1).all()


def test_onnx_runtime_needs_no_torch_and_copies_no_scores(color_onnx):
    pytest.importorskip("onnxruntime")
    code = (
        "import sys, numpy as np\n"
        "sys.modules['torch'] = None\n"
        "from wsss_deploy import Segmenter\n"
        "from wsss_deploy.pairwise import native\n"
        "taken = []\n"
        "run = native.refine\n"
        "def refine(p, masks, *args, **more):\n"
        "    taken.append(masks.ctypes.data)\n"
        "    run(p, masks, *args, **more)\n"
        "native.refine = refine\n"
        f"model = Segmenter({str(color_onnx)!r}, device='cpu', refine=True)\n"
        "session = model._backend._session\n"
        "class Spy:\n"
        "    def run(self, *given):\n"
        "        out = session.run(*given)\n"
        "        self.given = out[0].ctypes.data\n"
        "        return out\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(session, name)\n"
        "model._backend._plain = spy = Spy()\n"
        "model.predict(np.zeros((20, 30, 3), np.uint8))\n"
        "form = model.describe()['refinement']['form']\n"
        "assert form == 'numpy' or taken == [spy.given], (form, taken, spy.given)\n"
        "print(form)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ("cpu" if forms()[0].available else "numpy")


def test_without_compiled_kernels_the_plain_form_runs_and_says_so(monkeypatch, photo, color_onnx):
    pytest.importorskip("onnxruntime")
    expected = Segmenter(color_onnx, device="cpu", refine=PAR).predict(photo)
    monkeypatch.setattr(native, "load", lambda: (None, "no kernels"))
    model = Segmenter(color_onnx, device="cpu", refine=PAR)
    told = model.describe()["refinement"]
    assert told["form"] == "numpy"
    assert "no kernels" in told["form_reason"]
    # The compiled form stores 16 bits between steps, the plain one does not.
    np.testing.assert_allclose(model.predict(photo).network_scores, expected.network_scores, atol=1e-4)


def test_the_card_decides_unless_told_otherwise(color_card):
    def with_card(**change):
        return color_card.model_copy(update={"refinement": VARIANTS["par"].model_copy(update=change)})

    assert decide(None, color_card, True).settings is None
    assert decide(True, color_card, True).settings == DEFAULT
    assert decide(None, with_card(), True).settings == VARIANTS["par"]
    assert decide(False, with_card(), True).settings is None
    assert decide(None, with_card(enabled=False), True).settings is None
    assert decide(True, with_card(enabled=False), True).settings.parameters == PAR
    assert decide(GAUSSIAN, with_card(), True).settings == Refinement(parameters=GAUSSIAN)
    reasons = {decide(asked, with_card(), True).reason for asked in (None, True, False, GAUSSIAN)}
    assert len(reasons) == 4


def test_a_graph_that_refines_is_not_refined_again(color_card, onnx_bytes, tmp_path, photo):
    pytest.importorskip("onnxruntime")
    card = color_card.model_copy(update={"refinement": VARIANTS["par"].model_copy(update={"in_graph": True})})
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(card))  # its graph does not really: so a second pass would show
    (tmp_path / "plain.onnx").write_bytes(onnx_bytes(color_card))
    plain = Segmenter(tmp_path / "plain.onnx", device="cpu").predict(photo)
    for refine in (None, True):
        model = Segmenter(tmp_path / "model.onnx", device="cpu", refine=refine)
        result = model.predict(photo)
        np.testing.assert_array_equal(result.network_scores, plain.network_scores)
        assert result.timing["refinement"] == 0
        assert model.describe()["refinement"]["form"] == "graph"
    for refine in (False, PAR):
        with pytest.raises(UsageError, match="--refine none"):
            Segmenter(tmp_path / "model.onnx", device="cpu", refine=refine)


def test_parameters_that_lose_mass_are_refused(color_onnx):
    with pytest.raises(UsageError, match="set normalise"):
        Segmenter(color_onnx, refine=PairwiseParameters())
    with pytest.raises(ValidationError, match="set normalise"):
        Refinement(parameters=PairwiseParameters())


def test_features_that_a_guide_of_colours_has_not_are_refused():
    terms = ({"weight": 1.0, "sigma_rgb": 0.1, "sigma_features": 0.5},)
    parameters = {"kind": "gaussian", "dilations": (1,), "radius": None, "normalise": True, "terms": terms}
    with pytest.raises(ValueError, match="'opponent' has colours alone"):
        Refinement.model_validate({"parameters": parameters, "guide": "opponent"})


def test_pixels_without_any_neighbour_alike_keep_their_scores():
    scores = np.random.default_rng(0).dirichlet((1, 1, 1), (1, 9, 9)).transpose(0, 3, 1, 2).astype(np.float32)
    image = np.zeros((1, 9, 9, 3), np.uint8)
    image[0, 4, 4] = 255
    sharp = GAUSSIAN.model_copy(update={"terms": (GaussianTerm(sigma_rgb=0.01),)})
    lone = Refiner(Refinement(parameters=sharp))(scores, image)
    np.testing.assert_array_equal(lone[0, :, 4, 4], scores[0, :, 4, 4])
    np.testing.assert_allclose(lone.sum(1), 1, atol=1e-5)
    as_tensor = Refiner(Refinement(parameters=sharp))(torch.from_numpy(scores), torch.from_numpy(image))
    np.testing.assert_allclose(as_tensor, lone, atol=1e-6)
    tiny = Refiner(Refinement(parameters=sharp))(scores[:, :, :1, :1].copy(), image[:, :1, :1])
    np.testing.assert_array_equal(tiny, scores[:, :, :1, :1])


def test_the_card_keeps_it_and_old_cards_load(refinement, color_card, color_network, tmp_path):
    card = color_card.model_copy(update={"refinement": refinement})
    assert ModelCard.from_plain(card.to_plain(), "x") == card
    assert ModelCard.from_plain(card.to_json(), "x").refinement == refinement
    save_model(tmp_path / "model.pt", card, {})
    assert read_card(tmp_path / "model.pt").refinement == refinement
    old = color_card.to_plain()
    del old["refinement"]
    assert ModelCard.from_plain(old, "x") == color_card
    broken = card.to_plain()
    broken["refinement"]["parameters"]["dilations"] = [0]
    with pytest.raises(ArtifactError, match=r"refinement\.parameters\.dilations"):
        ModelCard.from_plain(broken, "x")


def call(main, *arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code


def test_commands(color_onnx, photo, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "a.png")
    told = {}
    for flag in ((), ("--refine",), ("--no-refine",)):
        out = tmp_path / "out"
        assert call(predict, tmp_path / "a.png", "--model", color_onnx, "--out", out, *flag) == 0
        record = json.loads((out / "predictions.json").read_text())
        told[flag] = record["runtime"]["refinement"]["form"]
        assert (record["images"][0]["timing_ms"]["refinement"] > 0) == (flag == ("--refine",))
    assert told[()] == told["--no-refine",] == "none"
    assert told["--refine",] in ("cpu", "numpy")
    text = capsys.readouterr().out
    assert "not refined" in text
    assert call(doctor, color_onnx, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert "refinement: none (the card names no refinement)" in text
    for form in forms():
        assert f"pairwise operator, form {form.name}: " in text
    assert "pairwise operator on arrays: form " in text
    assert call(doctor, "--json") == 0
    report = json.loads(capsys.readouterr().out)["pairwise"]
    assert report["forms"]["numpy"] == {"available": True, "reason": "plain numpy"}
    assert report["chosen"]["arrays"]["name"] in ("cpu", "numpy")
