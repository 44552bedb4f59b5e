from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.cam.labels import LabelRule, sure_labels
from training.cam.tokens import TokenCams, collect_tokens, fit_tokens, recall_of
from training.methods.tag_settings import TokenSettings
from training.token_stage import grid_labels
from wsss_deploy.networks.encoder import Encoder

# Directions of features: what all images share, and one of each class.
GRASS, RED, BLUE = 0, 1, 2
SETTINGS = TokenSettings(depth=1.0, iterations=300, learning_rate=0.01, scales=(1.0,))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder("test_vit").eval()


def scene(kinds, generator, side=6):
    """Tokens (36, 64) of a meadow with a patch of each class; and the truth (36,)."""
    truth = np.zeros((side, side), np.int64)
    for place, kind in zip(((0, 0), (3, 3)), kinds, strict=False):
        truth[place[0] : place[0] + 3, place[1] : place[1] + 3] = kind
    directions = torch.eye(64)[truth.flatten()]
    return directions * 4 + 0.5 * torch.randn(side * side, 64, generator=generator), truth.flatten()


class Given:
    """Stands for tokens on disk."""

    def __init__(self, scenes):
        self._images = scenes
        self._rows = torch.cat(scenes)
        self.sizes = [(6, 6)] * len(scenes)
        self.starts = np.cumsum([0, *map(len, scenes)])

    def __len__(self):
        return len(self._images)

    def image(self, index):
        return self._images[index]

    def rows(self, indices):
        return self._rows[indices]

    def moments(self):
        return self._rows.mean(0), self._rows.std(0)


def possible(kinds, classes):
    may = torch.zeros(len(kinds), classes, dtype=torch.bool)
    for row, each in zip(may, kinds, strict=True):
        row[[0, *each]] = True
    return may


def fitted(encoder, kinds, settings=SETTINGS, classes=3, known=None):
    generator = torch.Generator().manual_seed(1)
    scenes, truths = zip(*[scene(each, generator) for each in kinds], strict=True)
    model = TokenCams(settings, encoder, classes)
    labels = None if known is None else known(truths)
    fit_tokens(model, Given(list(scenes)), possible(kinds, classes), seed=0, known=labels)
    normalise, classifier = model.head.layers
    with torch.no_grad():
        features = [rows * normalise.weight + normalise.bias for rows in scenes]
        odds = [rows @ classifier.weight.flatten(1).T + classifier.bias for rows in features]
    return odds, truths


KINDS = [(RED,), (BLUE,), (RED, BLUE), (), (BLUE, RED), (RED,)] * 4


def test_what_images_share_is_background(encoder):
    odds, truths = fitted(encoder, KINDS)
    assert accuracy(odds, truths) > 0.95


@pytest.mark.parametrize("images", [False, True])
def test_a_few_known_positions_are_enough(encoder, images):
    def known(truths):
        labels = np.full((len(truths), 36), 255, np.uint8)
        for row, truth in zip(labels, truths, strict=True):
            for kind in np.unique(truth):
                row[np.flatnonzero(truth == kind)[:4]] = kind
        return labels.ravel()

    odds, truths = fitted(encoder, KINDS, SETTINGS.model_copy(update={"images": images}), known=known)
    assert accuracy(odds, truths) > 0.95


def test_recall_is_the_mean_over_classes(encoder):
    generator = torch.Generator().manual_seed(1)
    scenes, truths = zip(*[scene(each, generator) for each in KINDS], strict=True)
    tokens, may = Given(list(scenes)), possible(KINDS, 3)
    model = TokenCams(SETTINGS, encoder, 3)
    labels = np.concatenate(truths).astype(np.uint8)
    assert recall_of(model, tokens, may, labels) == pytest.approx(1 / 3), "all odds are 0: background everywhere"
    fit_tokens(model, tokens, may, seed=0, known=labels)
    assert recall_of(model, tokens, may, labels) > 0.95
    assert np.isnan(recall_of(model, tokens, may, np.full_like(labels, 255)))


def accuracy(odds, truths):
    """Of the likeliest class among the background and the image's own."""
    hits = []
    for scores, truth, kinds in zip(odds, truths, KINDS, strict=True):
        found = F.pad(scores, (1, 0))
        found[:, [kind for kind in (RED, BLUE) if kind not in kinds]] = -torch.inf
        hits.append(found.argmax(dim=1).numpy() == truth)
    return np.mean(hits)


def test_labels_on_a_grid():
    labels = np.full((10, 20), 255, np.uint8)
    labels[0, :3], labels[1, 0], labels[9, 19] = 1, 2, 0
    found = grid_labels(labels, (2, 4), 3)
    assert found.tolist() == [[1, 255, 255, 255], [255, 255, 255, 0]]


def test_a_class_without_images_and_images_without_classes(encoder):
    odds, _ = fitted(encoder, [(RED,), ()] * 6, classes=4)
    for scores in odds:
        assert scores.isfinite().all()
        assert set(F.pad(scores, (1, 0)).argmax(dim=1).tolist()) <= {0, RED}
    odds, _ = fitted(encoder, [()] * 4)
    assert all((scores < 0).all() for scores in odds), "nothing but background"


def test_tokens_on_disk_are_those_of_the_encoder(encoder, tmp_path):
    views = [torch.rand(1, 3, 32, 48), torch.rand(1, 3, 48, 16)]
    tokens = collect_tokens(tmp_path / "tokens", encoder, encoder.indices[-1], views)
    assert len(tokens) == 2
    assert tokens.sizes == ((2, 3), (3, 1))
    with torch.no_grad():
        expected = [encoder(view)[-1][0].flatten(1).T for view in views]
    expected = [F.layer_norm(rows, rows.shape[-1:]) for rows in expected]
    for index, rows in enumerate(expected):
        torch.testing.assert_close(tokens.image(index), rows, atol=5e-3, rtol=5e-3)
    whole = torch.cat(expected)
    torch.testing.assert_close(tokens.rows(np.array([1, 7])), whole[[1, 7]], atol=5e-3, rtol=5e-3)
    mean, deviation = tokens.moments()
    torch.testing.assert_close(mean, whole.mean(0), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(deviation, whole.std(0, correction=0), atol=5e-3, rtol=5e-3)


def test_probabilities_of_present_classes_only(encoder):
    model = TokenCams(TokenSettings(depth=1.0, scales=(1.0, 1.5)), encoder, 4).eval()
    torch.nn.init.normal_(model.head.layers[1].weight)
    tags = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    maps = model.cams(encoder, torch.rand(2, 3, 48, 64), tags)
    assert maps.shape == (2, 3, 48, 64)
    assert (maps[:, 1] == 0).all()
    assert (maps[1] == 0).all()
    assert (maps[0, ::2] > 0).all()
    assert (maps.sum(dim=1) < 1).all()
    shares = model.probabilities(encoder, torch.rand(1, 3, 48, 64), torch.tensor([[False, True, False, True]]))
    assert (shares[:, ::2] == 0).all()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, 48, 64))


def test_labels_are_given_where_a_probability_is_high():
    maps = torch.zeros(2, 3, 8, 8)
    maps[0, 0, :, :4], maps[0, 2, :, 4:] = 0.9, 0.55
    tags = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, 6:] = False
    rule = LabelRule(refiner=None, stride=1, sure=0.6)
    labels = sure_labels(torch.rand(2, 3, 8, 8), maps, tags, valid, rule)
    assert (labels[0, :, :4] == 1).all()
    assert (labels[0, :, 4:] == 255).all()
    assert (labels[1, :6] == 0).all()
    assert (labels[1, 6:] == 255).all()
    # A flat image refines nothing but borders.
    refined = sure_labels(torch.zeros(2, 3, 8, 8), maps, tags, valid, LabelRule(stride=1, sure=0.0))
    assert set(refined[0].unique().tolist()) <= {0, 1, 3}
