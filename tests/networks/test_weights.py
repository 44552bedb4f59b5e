"""Where the weights come from."""

from __future__ import annotations

import logging
import pickle

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file

from wsss_deploy.artifact import save_model
from wsss_deploy.card import Architecture
from wsss_deploy.errors import TrainingError
from wsss_deploy.networks import build_network
from wsss_deploy.networks.encoder import Encoder
from wsss_deploy.networks.weights import read_weights

TINY = Architecture(encoder="test_vit", decoder_width=16)


@pytest.fixture
def classifier():
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=10).state_dict()


def loaded(network, state):
    """Whether the encoder's tensors are those of the state."""
    own = network.encoder.model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"state_dict": {f"backbone.{name}": value for name, value in state.items()}},
])  # fmt: skip
def test_torch_files_with_and_without_wrapping(tmp_path, classifier, wrap):
    torch.save(wrap(classifier), tmp_path / "weights.pth")
    assert loaded(build_network(TINY, 3, weights=tmp_path / "weights.pth"), classifier)


def test_safetensors_and_what_is_left_out_is_logged(tmp_path, classifier, caplog):
    save_file(classifier, tmp_path / "weights.safetensors")
    with caplog.at_level(logging.INFO, logger="wsss_deploy"):
        assert loaded(build_network(TINY, 3, weights=str(tmp_path / "weights.safetensors")), classifier)
    assert "head.weight" in caplog.text


def test_the_shared_vit_tiny_loads(shared):
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    from safetensors.torch import load_file

    architecture = Architecture(encoder="vit_tiny_patch16_224", decoder_width=16)
    assert loaded(build_network(architecture, 3, weights=path), load_file(path))


def test_position_tables_of_another_grid_are_resampled(tmp_path, classifier):
    classifier["pos_embed"] = torch.randn(1, 1 + 6 * 6, 64)  # the model's own has 10 x 10
    save_file(classifier, tmp_path / "weights.safetensors")
    network = build_network(TINY, 3, weights=tmp_path / "weights.safetensors")
    table = network.encoder.model.pos_embed.detach()
    assert table.shape == (1, 101, 64)
    torch.testing.assert_close(table[:, 0], classifier["pos_embed"][:, 0])
    torch.testing.assert_close(table[:, 1:].mean(), classifier["pos_embed"][:, 1:].mean(), atol=0.03, rtol=0)


def test_our_own_model_starts_the_whole_network(tmp_path, tiny_card, tiny_network):
    save_model(tmp_path / "model.pt", tiny_card, tiny_network.state_dict())
    same = build_network(TINY, 4, weights=tmp_path / "model.pt").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in tiny_network.state_dict().items())
    more = build_network(TINY, 6, weights=tmp_path / "model.pt").state_dict()
    differing = {name for name, value in tiny_network.state_dict().items() if not torch.equal(value, more[name])}
    assert differing == {name for name in more if name.startswith("decoder.classify.")}
    with pytest.raises(TrainingError, match=r"another architecture.*decoder_width"):
        build_network(TINY.model_copy(update={"decoder_width": 32}), 4, weights=tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_named(tmp_path, classifier):
    save_file({name: value for name, value in classifier.items() if "blocks.3" not in name}, tmp_path / "a.safetensors")
    with pytest.raises(TrainingError, match=r"lacks blocks\.3\..* and \d+ more; .*--weights none"):
        build_network(TINY, 3, weights=tmp_path / "a.safetensors")
    save_file(timm.create_model("pvt_v2_b0").state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(TrainingError, match="does not fit encoder 'test_vit'"):
        build_network(TINY, 3, weights=tmp_path / "b.safetensors")


def test_files_that_are_no_weights(tmp_path, classifier):
    with pytest.raises(TrainingError, match="no such weights file"):
        build_network(TINY, 3, weights=tmp_path / "absent.pt")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(TrainingError, match=r"unknown kind of weights file '\.txt'"):
        build_network(TINY, 3, weights=tmp_path / "notes.txt")
    save_file(classifier, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not really")
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    for name in ("cut.safetensors", "cut.pt", "list.pt"):
        with pytest.raises(TrainingError, match=name):
            build_network(TINY, 3, weights=tmp_path / name)


@pytest.mark.parametrize("content", [b"hi\n", b"", b"\x80\x02K\x01.", b"h\x00", b"(lp0\n.", b"\x89PNG\r\n", b"}q\x00."])
def test_junk_is_no_weights_file(tmp_path, content):
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"junk\.pt"):
        build_network(TINY, 3, weights=tmp_path / "junk.pt")


def test_a_malicious_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(TrainingError, match=r"evil\.pt"):
        build_network(TINY, 3, weights=tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_download_says_what_to_do(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        TrainingError, match=r"could not be downloaded .*no route to host.*--weights PATH.*--weights none"
    ):
        build_network(TINY, 3, weights="timm")


def test_models_without_published_weights():
    architecture = Architecture(encoder="vit_betwixt_patch16_gap_256", encoder_options={"depth": 4})
    with pytest.raises(TrainingError, match="timm has no pretrained weights for 'vit_betwixt_patch16_gap_256'"):
        build_network(architecture, 3, weights="timm")


def test_without_a_network_the_hub_is_not_tried_again_and_again(monkeypatch):
    offline = []

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    def create(*_, **__):
        offline.append(hub.HF_HUB_OFFLINE)
        raise ConnectionError("offline")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    encoder = Encoder("vit_tiny_patch16_224")
    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(TrainingError, match="could not be downloaded"):
        read_weights("timm", encoder)
    assert offline == [True]
    assert hub.HF_HUB_OFFLINE is False
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    with pytest.raises(TrainingError, match="could not be downloaded"):
        read_weights("timm", encoder)
    assert offline == [True, False], "behind a proxy names need not resolve here"
