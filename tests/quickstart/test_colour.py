"""Colour alone must not give the class away: classifiers that see one pixel's colour have to fail."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.synthetic import CLASSES, draw_scene
from training.evaluate import Evaluator

BINS = 12


@pytest.fixture(scope="module")
def scenes():
    drawn = [draw_scene(np.random.default_rng([11, index])) for index in range(60)]
    return drawn[:48], drawn[48:]


def cells(image):
    quantised = image.astype(np.int64) * BINS // 256
    return (quantised[..., 0] * BINS + quantised[..., 1]) * BINS + quantised[..., 2]


@pytest.mark.parametrize("prior", ["as seen", "equal"])
def test_the_best_class_for_each_colour_is_a_poor_guess(scenes, prior):
    train, val = scenes
    counts = np.zeros((BINS**3, len(CLASSES)))
    for image, mask in train:
        np.add.at(counts, (cells(image).ravel(), mask.ravel()), 1)
    if prior == "equal":
        counts /= counts.sum(0)
    best = counts.argmax(1).astype(np.uint8)
    evaluator = Evaluator(CLASSES)
    for image, mask in val:
        evaluator.update(best[cells(image)], mask)
    # Guessing background everywhere gives about 0.57 / 7 = 0.08.
    assert evaluator.result().miou < 0.2


def test_the_colour_distributions_of_the_classes_overlap(scenes):
    train, _ = scenes
    for channel in range(3):
        means = [
            np.concatenate([image[mask == index][:, channel] for image, mask in train]).mean()
            for index in range(len(CLASSES))
        ]
        assert max(means) - min(means) < 45
