"""To a folder as the Hub would hold it and back, without a network connection."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model
from wsss_deploy.card import Protocol
from wsss_deploy.errors import ArtifactError, WsssError

hub = pytest.importorskip("wsss_deploy.networks.hub")


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    model = hub.HubModel.from_file(tiny_model)
    protocol = Protocol(
        supervision=("scribbles",),
        simulated=True,
        method="gated_crf",
        data="shapes",
        train_images=7,
        iterations=10,
        batch_size=2,
        size=64,
        seed=3,
        weights="none",
        selection="last",
        metrics={"val_miou": 0.51234},
        notes={"pipe|name": "a|b"},
    )
    model.card = model.card.model_copy(update={"protocol": protocol})
    model._hub_mixin_config = {"card": model.card.to_plain()}
    model.save_pretrained(folder)
    return folder


def test_there_and_back(saved, tiny_model, tmp_path):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = hub.HubModel.from_pretrained(saved)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = Segmenter(tiny_model, device="cpu").predict(image)
    np.testing.assert_array_equal(loaded.segmenter().predict(image).scores, expected.scores)
    assert loaded.card.protocol.seed == 3
    loaded.save_file(tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt")[0] == loaded.card


def test_the_readme_holds_the_protocol(saved):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\n")
    for part in ("library_name: wsss-deploy", "pipeline_tag: image-segmentation", "background, circle, square, star"):
        assert part in text
    for row in (
        "| Labels in training | scribbles, simulated from masks |",
        "| val_miou | 0.5123 |",
        "| pipe/name | a/b |",
    ):
        assert row in text
    assert "Not recorded" not in text


def test_push_sends_exactly_these_files(saved, monkeypatch, tmp_path):
    sent = {}

    def upload_folder(self, **arguments):
        sent.update(
            arguments, files=sorted(p.name for p in __import__("pathlib").Path(arguments["folder_path"]).iterdir())
        )
        return "done"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: type("R", (), {"repo_id": "me/roads"})())
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    hub.HubModel.from_pretrained(saved).push_to_hub("me/roads", token="none")
    assert sent["repo_id"] == "me/roads"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors"]


def test_what_does_not_fit_is_refused(saved, tmp_path):
    for name in ("absent", "pickle", "card"):
        shutil.copytree(saved, tmp_path / name)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "absent" / "model.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, tmp_path / "absent" / "model.safetensors")
    with pytest.raises(ArtifactError, match="lacks"):
        hub.HubModel.from_pretrained(tmp_path / "absent")
    config = json.loads((tmp_path / "card" / "config.json").read_text())
    config["card"]["classes"] = []
    (tmp_path / "card" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="classes"):
        hub.HubModel.from_pretrained(tmp_path / "card")
    with pytest.raises(ArtifactError, match=r"only model\.safetensors"):
        hub.HubModel._load_as_pickle(None, "pytorch_model.bin", "cpu", False)


def test_a_card_of_any_size_costs_no_memory(saved, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(saved, folder)
    content = json.loads((folder / "config.json").read_text())
    for options in ({"img_size": 16_000}, {"embed_dim": 16_000, "num_heads": 1}, {"embed_dim": 10**6}):
        content["card"]["architecture"]["encoder_options"] = options
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(WsssError, match=r"do not fit|beyond any model"):
            hub.HubModel.from_pretrained(folder)
