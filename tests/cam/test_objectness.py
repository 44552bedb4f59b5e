from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.cam.head import depth_index, encode
from training.cam.objectness import DEPTH, Objectness
from training.cam.tokens import TokenCams, Tokens, _object_seeds, collect_tokens, fit_tokens, images_per_class
from training.methods.tag_settings import TokenSettings
from wsss_deploy.networks.encoder import Encoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder("test_vit").eval()


def test_it_is_the_class_tokens_attention_and_the_middle(encoder, monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, *a, **o: seen.append((q, k)) or attend(q, k, *a, **o)
    )
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), Objectness(encoder) as objectness:
        encode(encoder, image, [max(encoder.indices)])
        objectness.add((4, 6))
    query, key = seen[depth_index(encoder, DEPTH)]
    weights = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(-1)
    prefix = key.shape[2] - 24
    attention = weights[0, :, 0, prefix:].mean(0).log().numpy()
    rows, columns = np.mgrid[:4, :6]
    middle = -(((rows + 0.5) / 4 - 0.5) ** 2 + ((columns + 0.5) / 6 - 0.5) ** 2).flatten()
    expected = sum((part - part.mean()) / part.std() for part in (attention, middle))
    np.testing.assert_allclose(objectness.maps[0], expected, rtol=1e-3, atol=1e-3)
    assert encode(encoder, image, [0])
    assert len(objectness.maps) == 1, "the hook is gone"


@pytest.mark.parametrize(
    ("name", "known"),
    [("test_vit", True), ("test_convnext", False), ("pvt_v2_b0", False), ("xcit_nano_12_p16_224", False)],
)
def test_which_encoders_have_it(name, known):
    assert Objectness.is_known(Encoder(name)) is known


def test_maps_of_an_earlier_depth_come_with_it(encoder, tmp_path):
    views = [torch.randn(1, 3, 32, 48), torch.randn(1, 3, 48, 32)]
    first = depth_index(encoder, 0.1)
    with Objectness(encoder) as objectness:
        assert first < objectness.index
        tokens = collect_tokens(tmp_path / "tokens", encoder, first, views, 2, objectness)
    assert [len(part) for part in objectness.maps] == [6, 6]
    expected = collect_tokens(tmp_path / "again", encoder, first, views, 2)
    assert all(torch.equal(tokens.image(index), expected.image(index)) for index in range(2))


def stored(folder, scenes, size=(6, 6)):
    """Tokens of scenes on disk."""
    path = folder / "tokens"
    path.write_bytes(torch.cat(scenes).half().numpy().tobytes())
    return Tokens(path, [size] * len(scenes), scenes[0].shape[1])


def carpets(count=48):
    """Scenes in which each class stands on a carpet of its own, as in a few photographs: tokens, truth, classes."""
    generator = torch.Generator().manual_seed(2)
    scenes, truths, may = [], [], torch.zeros(count, 3, dtype=torch.bool)
    for index in range(count):
        kind = 1 + index % 2
        truth = np.zeros((6, 6), np.int64)
        truth[1 + index % 3 : 4 + index % 3, 1:4] = kind
        directions = torch.eye(64)[np.where(truth == 0, 2 + kind, truth).flatten()]
        scenes.append(4 * directions + 0.5 * torch.randn(36, 64, generator=generator))
        truths.append(truth.flatten())
        may[index, [0, kind]] = True
    return scenes, truths, may


def right(encoder, folder, objectness):
    """Parts of the objects and of the background that the fitted classifier finds."""
    scenes, truths, may = carpets()
    model = TokenCams(TokenSettings(depth=1.0, iterations=300, learning_rate=0.01), encoder, 3)
    maps = None if objectness is None else [objectness(truth) for truth in truths]
    fit_tokens(model, stored(folder, scenes), may, seed=0, objectness=maps)
    normalise, classifier = model.head.layers
    hits = []
    with torch.no_grad():
        for rows, truth, own in zip(scenes, truths, may, strict=True):
            odds = F.linear(rows * normalise.weight + normalise.bias, classifier.weight.flatten(1), classifier.bias)
            found = F.pad(odds, (1, 0)).masked_fill(~own, -torch.inf).argmax(1).numpy()
            hits.append([(found == truth)[truth > 0].mean(), (found == truth)[truth == 0].mean()])
    return np.mean(hits, axis=0)


def test_it_tells_an_object_from_what_is_always_around_it(encoder, tmp_path):
    looks = right(encoder, tmp_path, lambda truth: np.where(truth > 0, 1.0, -1.0).astype(np.float32))
    assert looks.min() > 0.95
    assert right(encoder, tmp_path, None).min() < 0.6, "images and tags alone cannot"


def test_every_class_has_a_seed_in_each_of_its_images(tmp_path):
    """Also where another one is all that looks like an object."""
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    rows = torch.zeros(36, 2)
    rows[14:16, 0], rows[35, 1] = 3.0, 2.0
    looks = np.where(rows[:, 0] > 0, 5.0, 0.0).astype(np.float32)
    labels = _object_seeds(
        stored(tmp_path, [rows]), lambda given: given, layer, torch.ones(1, 3, dtype=torch.bool), [looks]
    )
    assert (labels[14:16] == 1).all()
    assert labels[35] == 2


def test_images_per_class():
    _, _, may = carpets(11)
    assert images_per_class(may) == 5.5
    assert images_per_class(torch.zeros(3, 4, dtype=torch.bool)) == 0
    assert images_per_class(F.pad(may, (0, 1))) == 5.5, "a class that nobody has does not count"
