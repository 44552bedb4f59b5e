"""A trained model carries the refinement that helps on its validation images, or none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from training.data.dataset import open_dataset
from training.refinement_choice import CANDIDATES, choose_refinement
from wsss_deploy.card import Architecture, ModelCard, Preprocessing


class Thresholded(nn.Module):
    """Bright is class 1; the logits are blurred or right."""

    def __init__(self, blur: int) -> None:
        super().__init__()
        self.blur = blur

    def forward(self, image):
        bright = (image.mean(1, keepdim=True) > 0.4).float() * 2 - 1
        soft = nn.functional.avg_pool2d(bright, self.blur, 1, self.blur // 2, count_include_pad=False)
        return torch.cat([-soft, soft + 0.3], dim=1)  # shifted, so that a blurred border lies elsewhere


@pytest.fixture
def card():
    return ModelCard(
        name="bright",
        classes=("dark", "bright"),
        palette=((0, 0, 0), (255, 255, 255)),
        architecture=Architecture(encoder="test_vit"),
        preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=4),
    )


def test_blurred_borders_are_refined_and_right_ones_left_alone(squares, card):
    source = open_dataset(squares)
    names = source.splits["val"]
    blurred = choose_refinement(Thresholded(9), card, source, names)
    assert blurred.refinement in CANDIDATES
    assert blurred.metrics()["val_refined_miou"] > blurred.plain.miou + 0.01
    told = json.loads(json.dumps(blurred.to_plain()))
    assert told["chosen"] == str(blurred.refinement)
    best = max(figures["miou"] for figures in told["candidates"].values())
    assert best == blurred.metrics()["val_refined_miou"]
    right = choose_refinement(Thresholded(1), card, source, names)
    assert right.plain.miou > 0.99
    assert right.refinement is None
    assert right.metrics() == {}
    assert right.to_plain()["chosen"] == "none"


def test_what_is_chosen_is_what_the_segmenter_does(squares, card):
    from training.evaluate import evaluate
    from wsss_deploy import Segmenter

    source = open_dataset(squares)
    names = source.splits["val"]
    network = Thresholded(9)
    choice = choose_refinement(network, card, source, names)
    segmenter = Segmenter.from_network(network, card.model_copy(update={"refinement": choice.refinement}))
    result = evaluate(segmenter, source, names, "val")
    assert result.miou == pytest.approx(choice.metrics()["val_refined_miou"], abs=1e-6)
    assert result.protocol["refinement"] == str(choice.refinement)
    assert np.isfinite(result.mean_boundary_iou)
