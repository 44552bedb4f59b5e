"""Encoders that work at one size only: the graph pads to it and the runtime keeps images within it."""

from __future__ import annotations

import numpy as np
import pytest

from export.fixed_size import with_fixed_size
from export.onnx_graph import export_onnx
from wsss_deploy import Segmenter
from wsss_deploy.artifact import read_card
from wsss_deploy.card import Preprocessing, Sizing
from wsss_deploy.errors import ExportError
from wsss_deploy.sizing import network_size

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_swin_agrees_with_torch_at_its_fixed_size(write, tmp_path):
    # Shifted windows need two blocks; 96 pixels are 24 positions: more than one window of 7, padded.
    model = write(tmp_path / "model.pt", "swin_tiny_patch4_window7_224")
    path = export_onnx(model, tmp_path)
    card = read_card(path)
    assert card.preprocessing.fixed_size == 96
    fixed = Segmenter.from_network(restored(model, card), card)
    exported = Segmenter(path, device="cpu")
    rng = np.random.default_rng(0)
    for shape in ((300, 200), (64, 96), (7, 300), (1, 1)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        np.testing.assert_allclose(exported.predict(image).scores, fixed.predict(image).scores, atol=1e-4)


def restored(model, card):
    from wsss_deploy.artifact import load_model
    from wsss_deploy.networks import restore_network

    return restore_network(card, load_model(model)[1], "model.pt")


@pytest.mark.parametrize(
    ("sizing", "expected"),
    [(Sizing(), (64, 48)), (Sizing(long_side=512), (96, 64)), (Sizing(long_side=64), (64, 64))],
)
def test_sizes_stay_within_the_fixed_size(tiny_card, sizing, expected):
    preprocessing = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=32, fixed_size=96)
    card = tiny_card.model_copy(update={"preprocessing": preprocessing, "sizing": sizing})
    assert network_size(64, 48, card) == expected
    for shape in ((1000, 1000), (97, 3), (1, 5000)):
        assert max(network_size(*shape, card)) <= 96


def test_a_fixed_size_takes_the_windows_of_the_card(tiny_card):
    card = tiny_card.model_copy(update={"sizing": Sizing(tile=120, overlap=8)})
    with pytest.raises(ExportError, match=r"windows of 120 pixels.*pass --size 128 or more"):
        with_fixed_size(card, 96, "model.pt")
    assert with_fixed_size(card, 128, "model.pt").preprocessing.fixed_size == 128


@pytest.mark.parametrize(
    ("stride", "sizing", "size"),
    [
        (32, Sizing(tile=700, overlap=8), 704),
        (32, Sizing(tile=120, overlap=8), 128),
        (32, Sizing(tile=16384), 16384),
        (32, Sizing(long_side=700), 512),
        (32, Sizing(long_side=400), 416),
    ],
)
def test_an_encoder_of_one_size_takes_the_windows_of_its_card(tiny_card, stride, sizing, size):
    architecture = tiny_card.architecture.model_copy(update={"encoder": "swin_tiny_patch4_window7_224"})
    preprocessing = tiny_card.preprocessing.model_copy(update={"stride": stride})
    changed = {"architecture": architecture, "sizing": sizing, "preprocessing": preprocessing}
    card = tiny_card.model_copy(update=changed)
    assert with_fixed_size(card, None, "model.pt").preprocessing.fixed_size == size
    if sizing.tile:
        with pytest.raises(ExportError, match=r"windows of .* pixels"):
            with_fixed_size(card, 64, "model.pt")


def test_windows_beyond_the_largest_multiple_of_the_stride(tiny_card):
    architecture = tiny_card.architecture.model_copy(update={"encoder": "swin_tiny_patch4_window7_224"})
    preprocessing = tiny_card.preprocessing.model_copy(update={"stride": 28})
    changed = {"architecture": architecture, "sizing": Sizing(tile=16384), "preprocessing": preprocessing}
    with pytest.raises(ExportError, match=r"a graph of size 16380 .*; no size does; cut smaller windows"):
        with_fixed_size(tiny_card.model_copy(update=changed), None, "model.pt")


def test_a_fixed_size_is_a_multiple_of_the_stride():
    with pytest.raises(ValueError, match="expected a multiple of the stride 32"):
        Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), stride=32, fixed_size=100)
