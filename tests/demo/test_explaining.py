"""The influence of pixels on one another, and the classes' scores."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from demo.comparing import refinement_of
from demo.explaining import influence, listening, loudest_class, tinted
from demo.registry import Models
from wsss_deploy.activation import CAMS
from wsss_deploy.backends.base import Availability
from wsss_deploy.refinement import Refiner


@pytest.mark.parametrize(("steps", "sharpness", "reach"), [(0, 1, "near"), (1, 0.5, "far"), (5, 2, "middle")])
@pytest.mark.parametrize("place", [(0, 0), (9, 13), (17, 23)])
def test_influence_times_scores_is_the_refined_score(steps, sharpness, reach, place):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (18, 24, 3), np.uint8)
    scores = rng.random((1, 4, 18, 24)).astype(np.float32)
    settings = refinement_of(steps, sharpness, reach)
    heard = influence(image, settings, *place)
    assert heard.sum() == pytest.approx(1, abs=1e-5)
    refined = Refiner(settings, threads=1)(scores, image[None])[0, :, place[0], place[1]]
    np.testing.assert_allclose((scores[0] * heard).sum(axis=(1, 2)), refined, atol=1e-4)


def test_a_pixel_listens_to_its_own_side_of_an_edge():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    heard = influence(image, refinement_of(5, 2, "near"), 16, 12)
    assert heard[:, :16].sum() > 0.95
    found = listening(image, image, refinement_of(5, 2, "near"), 12.5 / 32, 0.5)
    assert found.picture.size == (704, 704)
    assert 1 < found.pixels < 32 * 16
    assert 0 < found.distance < 32


def test_pictures_and_the_loudest_class():
    scores = np.zeros((3, 4, 6), np.float32)
    scores[0], scores[2, 1:3, 2:4] = 0.9, 0.8
    assert loudest_class(scores, ("background", "cat", "dog")) == 2
    assert loudest_class(scores, ("road", "cat", "dog")) == 0
    picture = np.asarray(tinted(np.full((40, 60, 3), 200, np.uint8), scores[2]), int)
    assert picture.shape == (40, 60, 3)
    assert picture[20, 30].sum() > picture[2, 2].sum()


def test_the_controls_start_at_the_models_own_refinement():
    from demo.comparing import controls_of, refinement_of
    from wsss_deploy.refinement import DEFAULT, STRONG

    for settings in (DEFAULT, STRONG):
        assert str(refinement_of(*controls_of(settings))) == str(settings)
    assert controls_of(None) == controls_of(DEFAULT) == (5, 1.0, "middle")
    assert controls_of(STRONG) == (8, 1.0, "far")


def test_the_classifier_beside_a_model_is_found(tmp_path, tiny_model, monkeypatch):
    run = tmp_path / "runs" / "run-001"
    run.mkdir(parents=True)
    shutil.copy(tiny_model, run / "model.pt")
    models = Models(runs=tmp_path / "runs")
    assert models.cams("run-001/model.pt") is None
    shutil.copy(tiny_model, run / CAMS)
    assert models.cams("run-001/model.pt").card.name == "tiny"
    assert models.cams("unknown") is None
    monkeypatch.setattr("demo.registry.can_run", lambda name: Availability(False, "not installed"))
    assert models.cams("run-001/model.pt") is None  # the model itself may be an exported one
