from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import nn

import training.cam_stage
import training.run
import training.token_stage
from training.cam.attention import AffinityHead, AttentionTap
from training.cam.head import CamHead, depth_index, encode, freeze
from training.cam.pseudo_labels import write_label
from training.cam.scoring import BACKGROUNDS, score_cams, score_labels, score_made_labels
from training.cam_stage import LABELS, STAGE, finished_classifier, tag_counts
from training.data.dataset import open_dataset
from training.data.pipeline import TrainingSet
from training.evaluate_cli import main as evaluate_command
from training.methods import Batch, build_method
from training.methods.cam_methods import SharedFeatureCams
from training.methods.settings import MethodSettings
from training.methods.tag_settings import SharedFeatureSettings
from training.recipe import read_recipe
from training.run import resolve_recipe, run
from training.state import CHECKPOINT
from wsss_deploy.activation import CAMS
from wsss_deploy.artifact import load_model
from wsss_deploy.card import Architecture, Preprocessing
from wsss_deploy.errors import DataError, RecipeError, TrainingError
from wsss_deploy.networks import build_network
from wsss_deploy.networks.encoder import Encoder

SIZE = 48
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), stride=16)


def write_tagged(root, classes=("background", "red", "green", "blue")):
    """Coloured squares on dark noise; nobody has class 3, one image has no class, one is not tagged."""
    rng = np.random.default_rng(3)
    for folder in ("images", "splits", "masks"):
        (root / folder).mkdir(parents=True)
    tags = {}
    for index in range(10):
        name, kind = f"scene{index}", index % 3
        mask = np.zeros((SIZE, SIZE), np.uint8)
        y, x = rng.integers(2, SIZE - 26, 2)
        mask[y : y + 24, x : x + 24] = kind
        image = rng.integers(0, 60, (SIZE, SIZE, 3))
        image[mask > 0, kind - 1] = 220
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{name}.png")
        if index >= 7:
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        elif index != 5:
            tags[name] = [kind] if kind else []
    (root / "tags.json").write_text(json.dumps(tags))
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (root / "splits" / "train.txt").write_text("\n".join(f"scene{i}" for i in range(7)) + "\n")
    (root / "splits" / "val.txt").write_text("\n".join(f"scene{i}" for i in range(7, 10)) + "\n")
    return root


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    return write_tagged(tmp_path_factory.mktemp("tagged") / "colours")


@pytest.fixture
def values():
    return {
        "model": {"encoder": "test_vit", "weights": "none", "decoder_width": 32},
        "augmentation": {"size": SIZE},
        "optimisation": {"iterations": 4, "batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"every": 4},
        "precision": "fp32",
        "device": "cpu",
    }


def train(data, folder, values, resume=False):
    source = open_dataset(data)
    return run(resolve_recipe(source, "tags", [values]), source, folder, resume, show=False)


def two_stages(name="tags", **options):
    return {"name": name, "cam_iterations": 3, **options}


TOKENS = {"kind": "tokens", "iterations": 3, "batch_size": 2, "rounds": 1, "scales": [1.0, 2.0]}
SHARED = {"sides": [8, 8, 8, 8], "scales": [1.0, 0.5], "bank_draws": 2}


@pytest.mark.parametrize(
    "method",
    [
        two_stages(cams={"scales": [1.0]}, crf_weight=0.1, crf_start=0.0, correction={"start": 0.3, "threshold": 0.6}),
        {"name": "tags", "cams": TOKENS},
        {"name": "tags", "cams": TOKENS, "correspondence_weight": 0.1, "samples": 4},
        two_stages("sfc", cams=SHARED),
        two_stages("sfc", cams=SHARED, correspondence_weight=0.1, samples=4),
        {"name": "tscd", "start": 0.3, "samples": 4, "cams": {"scales": [1.0, 0.5]}, "regulariser_weight": 0.01},
        {"name": "tscd", "start": 0.3, "samples": 4, "cams": {"kind": "shared_feature", **SHARED}},
    ],
    ids=["classifier", "tokens", "tokens-scd", "sfc", "sfc-scd", "tscd", "tscd-sfc"],
)
def test_a_run_from_tags_alone(tagged, tmp_path, values, method):
    result = train(tagged, tmp_path / "run", values | {"method": method})
    card, state = load_model(result.model)
    assert card.protocol.supervision == ("tags",)
    assert card.protocol.method == method["name"]
    assert not card.protocol.simulated
    assert all(value.isfinite().all() for value in state.values())
    assert not any("classify.0" in name and "head" in name for name in state), "heads stay behind"
    assert result.trained.result.images == 3
    maps, _ = load_model(tmp_path / "run" / CAMS)
    assert maps.classes == card.classes


def test_a_single_stage_says_that_its_maps_are_not_saved(tagged, tmp_path, values, caplog):
    values["model"] = {"encoder": "test_convnext", "weights": "none", "decoder_width": 16}
    values["augmentation"] = {"size": 64}
    cams = {"scales": [1.0], "depths": [0.5], "depth": 0.5}
    options = {"affinity_weight": 0, "correspondence_weight": 0, "consistency_weight": 0}
    caplog.set_level("WARNING")
    train(tagged, tmp_path / "run", values | {"method": {"name": "tscd", "cams": cams, **options}})
    assert not (tmp_path / "run" / CAMS).exists()
    assert f"{CAMS}: not written" in caplog.text


def test_a_refused_resume_leaves_the_run_as_it_is(tagged, tmp_path, values):
    folder = tmp_path / "run"
    values["method"] = {"name": "tags", "cams": TOKENS}
    whole = load_model(train(tagged, folder, values).model)[1]
    (folder / "model.pt").unlink()
    for changed in ({"labels": {"sure": 0.3}}, {"cams": TOKENS | {"rounds": 2}}):
        with pytest.raises(TrainingError, match="another recipe"):
            train(tagged, folder, values | {"method": values["method"] | changed}, resume=True)
    again = load_model(train(tagged, folder, read_recipe(folder / "recipe.yaml"), resume=True).model)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_background_among_tags_says_nothing(tagged, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tagged, data)
    tags = json.loads((data / "tags.json").read_text())
    (data / "tags.json").write_text(json.dumps({name: [0, *kinds] for name, kinds in tags.items()}))
    source = open_dataset(data)
    assert source.tags("scene1") == (1,)
    assert source.tags("scene0") == ()


def test_tags_alone_are_learnt_from_without_being_named(tagged, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(tagged, data)
    shutil.rmtree(data / "masks")
    source = open_dataset(data)
    with caplog.at_level("INFO"):
        recipe = resolve_recipe(source, None, [])
    assert recipe.supervision == "tags"
    assert recipe.method.name == "tags"
    assert "auto means tags here" in caplog.text
    # With labels of pixels it learns from these, and a training without any says so.
    labelled = open_dataset(tagged)
    assert "masks" in labelled.kinds(labelled.splits["val"][0])
    assert resolve_recipe(labelled, None, [{"train_split": "val"}]).supervision == "masks"
    with pytest.raises(DataError, match="6 have tags: use --supervision tags"):
        TrainingSet(source, source.splits["train"], "auto", recipe.augmentation, 0)


def test_the_depth_of_the_cam_may_change_after_the_classifiers_are_trained(tagged, tmp_path, values):
    folder = tmp_path / "run"
    values["method"] = two_stages(cams={"kind": "classifier", "depths": [0.5, 0.75], "depth": 0.5, "scales": [1.0]})
    train(tagged, folder, values)
    for name in (CHECKPOINT, "model.pt"):
        (folder / name).unlink()
    values["method"]["cams"] |= {"depth": 0.75}
    assert train(tagged, folder, values, resume=True).trained.result.images == 3


def test_the_depth_of_the_cam_has_a_classifier(tagged, values):
    chosen = {"method": {"name": "tags", "cams": {"kind": "classifier", "depth": 0.5}}}
    with pytest.raises(RecipeError, match=r"depth is 0.5, depths are \(1.0,\)"):
        resolve_recipe(open_dataset(tagged), "tags", [values, chosen])


@pytest.mark.parametrize(
    "method",
    [
        two_stages(correspondence_weight=0.1, samples=4),
        two_stages("sfc", cams=SHARED, correspondence_weight=0.1, samples=4),
    ],
)
def test_self_correspondence_with_simulated_tags(tagged, tmp_path, values, method):
    data = tmp_path / "data"
    shutil.copytree(tagged, data)
    (data / "tags.json").unlink()
    for name in ("scene0", "scene1", "scene2"):
        index = int(name[-1])
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[8:24, 8:24] = index % 3
        Image.fromarray(mask).save(data / "masks" / f"{name}.png")
    card, _ = load_model(train(data, tmp_path / "run", values | {"method": method}).model)
    assert card.protocol.simulated


def test_self_correspondence_follows_the_first_stage(values):
    settings = TypeAdapter(MethodSettings).validate_python(
        {"name": "tags", "correspondence_weight": 0.5, "samples": 6, "small_view": 0.5}
    )
    with pytest.raises(RecipeError, match="class_maps"):
        build_method(settings, 4, HALF)
    torch.manual_seed(0)
    network = build_network(Architecture(encoder="test_vit", decoder_width=32), 4, weights="none")
    left = torch.zeros(2, 2, SIZE, SIZE)
    left[:, 0, :, : SIZE // 2], left[:, 1, :, SIZE // 2 :] = 1, 1

    def class_maps(image, tags):
        assert tags.shape == (2, 4)
        return torch.nn.functional.interpolate(left, image.shape[-2:])

    method = build_method(settings, 4, HALF, class_maps=class_maps)
    image = torch.cat([left, left[:, :1]], dim=1)
    labels = torch.full((2, SIZE, SIZE), 255)
    batch = Batch(image, labels, labels == 255, torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(40):
        optimiser.zero_grad()
        terms = method(network, batch, 0.5)
        terms["correspondence"].backward()
        optimiser.step()
    assert terms["pseudo_ce"] == 0, "no label anywhere"
    logits = torch.nn.functional.normalize(network.eval()(image), dim=1)
    middle = logits.shape[-1] // 2
    one, other = logits[..., : middle - 2].mean(dim=(2, 3)), logits[..., middle + 2 :].mean(dim=(2, 3))
    assert (torch.cosine_similarity(one, other) < 0.5).all(), "halves that the maps tell apart come to differ"


@pytest.mark.parametrize("method", [two_stages(), {"name": "tags", "cams": TOKENS}], ids=["classifier", "tokens"])
def test_pseudo_labels_know_what_tags_say(tagged, tmp_path, values, method):
    train(tagged, tmp_path / "run", values | {"method": method})
    labels = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "run" / LABELS).glob("*.png")}
    assert sorted(labels) == [f"scene{i}" for i in (0, 1, 2, 3, 4, 6)], "an image that nobody tagged gets no label"
    for name, label in labels.items():
        kind = int(name[-1]) % 3
        assert label.shape == (SIZE, SIZE)
        assert set(np.unique(label)) <= {0, kind, 255}
        if kind == 0:
            assert (label == 0).all(), "tagged with nothing: all background"


def test_the_default_relies_on_features_only_where_there_are_any(tagged, values):
    source = open_dataset(tagged)
    assert resolve_recipe(source, "tags", [values]).method.cams.kind == "classifier"
    trained = {"model": {"weights": "timm"}}
    assert resolve_recipe(source, "tags", [values, trained]).method.cams.kind == "tokens"
    chosen = {"method": {"cams": {"kind": "tokens"}}}
    assert resolve_recipe(source, "tags", [values, chosen]).method.cams.kind == "tokens"
    for name in ("tags", "sfc"):
        rates = [
            resolve_recipe(source, "tags", [values, extra, {"method": {"name": name}}]).method.cam_learning_rate
            for extra in ({}, trained)
        ]
        assert rates == [1e-4, 2e-5], "what knows nothing has to learn"
    assert resolve_recipe(source, "tags", [trained, {"method": {"name": "tscd"}}]).optimisation.learning_rate == 2e-5


@pytest.mark.parametrize("encoder", ["test_convnext", "pvt_v2_b0"])
def test_tokens_of_a_hierarchical_encoder(tagged, tmp_path, values, encoder):
    values["model"] = values["model"] | {"encoder": encoder}
    values["augmentation"] = {"size": 64}
    values["method"] = {"name": "tags", "cams": TOKENS | {"depth": 0.75}}
    train(tagged, tmp_path / "run", values)
    labels = [np.asarray(Image.open(path)) for path in (tmp_path / "run" / LABELS).glob("*.png")]
    assert len(labels) == 6


@pytest.mark.parametrize(
    ("options", "looked", "told"),
    [
        ({}, True, "what looks like an object"),
        ({"objectness": "off"}, False, "may be taken for it"),
        ({"few_images": 0}, False, ""),
        ({"rounds": 0}, False, "may be taken for it"),
    ],
)
def test_few_images_are_looked_at_so_and_said(tagged, tmp_path, values, monkeypatch, caplog, options, looked, told):
    given = []
    fit = training.token_stage.fit_tokens
    monkeypatch.setattr(training.token_stage, "fit_tokens", lambda *rest: given.append(rest[-1]) or fit(*rest))
    caplog.set_level("WARNING")
    train(tagged, tmp_path / "run", values | {"method": {"name": "tags", "cams": TOKENS | options}})
    assert (given[0] is not None) is looked
    assert ("images a class (median) are few" in caplog.text) is bool(told)
    assert told in caplog.text


def test_fitted_classifiers_are_kept(tagged, tmp_path, values, monkeypatch):
    values["method"] = {"name": "tags", "cams": TOKENS}
    folder = tmp_path / "run"
    whole = load_model(train(tagged, folder, values).model)[1]
    assert not list(folder.rglob("*.tokens"))
    (folder / "model.pt").unlink()
    (folder / CHECKPOINT).unlink()
    shutil.rmtree(folder / LABELS)
    monkeypatch.setattr(training.token_stage, "fit_tokens", None)
    again = load_model(train(tagged, folder, values, resume=True).model)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    (folder / "model.pt").unlink()
    shutil.rmtree(folder / LABELS)
    values["method"] = {"name": "tags", "cams": TOKENS | {"pooling": 0.5}}
    with pytest.raises(TrainingError, match="another recipe"):
        train(tagged, folder, values, resume=True)


def write_points(data, folder):
    """The same scenes with a point an object and one of the background instead of tags."""
    shutil.copytree(data, folder)
    (folder / "tags.json").unlink()
    (folder / "points").mkdir()
    for index in range(7):
        name, kind = f"scene{index}", index % 3
        image = np.asarray(Image.open(folder / "images" / f"{name}.png")).astype(int)
        points = np.full((SIZE, SIZE), 255, np.uint8)
        ys, xs = np.nonzero(image.max(axis=2) > 200)
        points[1, 1] = 0
        if kind:
            points[ys.mean().round().astype(int), xs.mean().round().astype(int)] = kind
        Image.fromarray(points).save(folder / "points" / f"{name}.png")
    return folder


def carrying(**options):
    return {"name": "partial_ce", "propagate": {"tokens": TOKENS, "labels": {"sure": 0.0}, "least": 0.0, **options}}


@pytest.mark.parametrize(("images", "walk"), [(False, None), (True, None), (False, {"restart": 0.1})])
def test_labels_of_a_few_pixels_are_carried_on(tagged, tmp_path, values, monkeypatch, images, walk):
    data = write_points(tagged, tmp_path / "data")
    (data / "scribbles").mkdir()
    Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(data / "scribbles" / "scene3.png")
    without = np.asarray(Image.open(data / "points" / "scene1.png")).copy()
    without[without == 0] = 255
    Image.fromarray(without).save(data / "points" / "scene1.png")
    source = open_dataset(data)
    walks, do = [], training.cam.tokens.random_walk
    monkeypatch.setattr(training.cam.tokens, "random_walk", lambda *rest: walks.append(rest[2:]) or do(*rest))
    values["method"] = carrying(tokens=TOKENS | {"images": images}, walk=walk)
    recipe = resolve_recipe(source, "points", [values])
    folder = tmp_path / "run"
    card, state = load_model(run(recipe, source, folder, show=False).model)
    assert card.protocol.supervision == ("points",)
    assert "carried on" in card.protocol.notes["labels"]
    radius, checked = recipe.augmentation.point_radius, 0
    for path in (folder / LABELS).glob("*.png"):
        labels, given = np.asarray(Image.open(path)), source.load_labels(path.stem, "points")
        assert set(np.unique(labels).tolist()) <= {0, *np.unique(given[given != 255]).tolist()}
        for y, x in zip(*np.nonzero(given != 255), strict=True):
            disc = labels[y - 1 : y + 2, x - 1 : x + 2]
            assert (disc == given[y, x]).all(), "what was given stays"
            checked += 1
        assert (labels != 255).mean() > 0.9
    assert checked > 7
    assert radius >= 2, "the patch that is looked at lies in the disc"
    # Twice, by the scales, from every image but the one whose background has no label.
    assert len(walks) == (2 * (len(list((folder / LABELS).glob("*.png"))) - 1) if walk else 0)
    assert all(parts.sum() > 0 and tuple(how) == (10.0, 0.1) for parts, *how in walks)
    (folder / "model.pt").unlink()
    (folder / CHECKPOINT).unlink()
    shutil.rmtree(folder / LABELS)
    monkeypatch.setattr(training.token_stage, "fit_tokens", None)
    again = load_model(run(recipe, source, folder, resume=True, show=False).model)[1]
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize(("least", "terms"), [(0.0, {"partial_ce"}), (1.0, {"partial_ce", "teacher"})])
def test_the_methods_other_terms_are_for_labels_that_are_not_carried_on(
    tagged, tmp_path, values, monkeypatch, least, terms
):
    seen, build = [], training.run.build_method

    def building(settings, *rest):
        method = build(settings, *rest)
        method.register_forward_hook(lambda _module, _given, found: seen.append(set(found)))
        return method

    monkeypatch.setattr(training.run, "build_method", building)
    monkeypatch.setattr(training.token_stage, "recall_of", lambda *_: 0.5)
    source = open_dataset(write_points(tagged, tmp_path / "data"))
    values["method"] = carrying(least=least, alone=True) | {"teacher": {"start": 0.0}}
    run(resolve_recipe(source, "points", [values]), source, tmp_path / "run", show=False)
    assert seen
    assert all(found == terms for found in seen)


def test_labels_are_not_carried_on_by_features_that_tell_nothing_apart(tagged, tmp_path, values, caplog, monkeypatch):
    monkeypatch.setattr(training.token_stage, "recall_of", lambda *_: 0.6)
    source = open_dataset(write_points(tagged, tmp_path / "data"))
    values["method"] = carrying(least=0.75)
    recipe = resolve_recipe(source, "points", [values])
    card, _ = load_model(run(recipe, source, tmp_path / "run", show=False).model)
    assert "labels are not carried on" in caplog.text
    assert not list((tmp_path / "run" / LABELS).glob("*.png"))
    assert "labels" not in card.protocol.notes


def test_images_without_labels_and_masks_that_stay(tagged, tmp_path, values):
    data = write_points(tagged, tmp_path / "data")
    Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(data / "points" / "scene4.png")
    mask = np.full((SIZE, SIZE), 2, np.uint8)
    Image.fromarray(mask).save(data / "masks" / "scene2.png")
    source = open_dataset(data)
    values["method"] = carrying()
    run(resolve_recipe(source, "auto", [values]), source, tmp_path / "run", show=False)
    labels = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "run" / LABELS).glob("*.png")}
    assert (labels["scene4"] == 255).all(), "nothing is known of it"
    np.testing.assert_array_equal(labels["scene2"], mask)
    for path in (data / "points").glob("*.png"):
        Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(path)
    source = open_dataset(data)
    with pytest.raises(DataError, match="no image has a label of any pixel"):
        run(resolve_recipe(source, "points", [values]), source, tmp_path / "other", show=False)


def test_labels_of_another_rule_are_made_anew(tagged, tmp_path, values, monkeypatch):
    folder = tmp_path / "run"
    values["method"] = {"name": "tags", "cams": TOKENS}
    train(tagged, folder, values)
    for name in (CHECKPOINT, "model.pt"):
        (folder / name).unlink()
    (folder / LABELS / "scene0.png").unlink()
    made, write = [], training.cam_stage.write_label
    monkeypatch.setattr(
        training.cam_stage, "write_label", lambda path, *rest: made.append(path.stem) or write(path, *rest)
    )
    train(tagged, folder, values, resume=True)
    assert made == ["scene0"]
    for name in (CHECKPOINT, "model.pt"):
        (folder / name).unlink()
    values["method"] = {"name": "tags", "cams": TOKENS, "labels": {"sure": 0.99}}
    train(tagged, folder, values, resume=True)
    assert len(made) == 1 + 6
    for count, changed in enumerate(({"calibration": None}, {"scales": [1.0]}), start=2):
        for name in (CHECKPOINT, "model.pt"):
            (folder / name).unlink()
        values["method"] = {"name": "tags", "cams": TOKENS | changed, "labels": {"sure": 0.99}}
        train(tagged, folder, values, resume=True)
        assert len(made) == 1 + 6 * count
    for name in (CHECKPOINT, "model.pt"):
        (folder / name).unlink()
    values["method"] = {"name": "tags", "cams": TOKENS | {"rounds": 2}, "labels": {"sure": 0.99}}
    with pytest.raises(TrainingError, match=r"another recipe \(differs in method.cams.rounds"):
        train(tagged, folder, values, resume=True)  # all labels are there, but of another classifier
    before = len(made)
    shutil.rmtree(folder / STAGE)
    train(tagged, folder, values)
    assert len(made) == before + 6, "and so they are where that classifier is gone"


def test_seeds_of_images_need_a_background(tmp_path, values):
    source = open_dataset(write_points(write_tagged(tmp_path / "a", ("dark", "red", "green", "blue")), tmp_path / "b"))
    values["method"] = carrying(tokens=TOKENS | {"images": True})
    with pytest.raises(RecipeError, match="needs a class 'background' first"):
        run(resolve_recipe(source, "points", [values]), source, tmp_path / "run", show=False)


@pytest.mark.parametrize("stop", ["training", "labels"])
def test_a_stopped_first_stage_goes_on(tagged, tmp_path, values, stop, monkeypatch):
    values["method"] = two_stages()
    whole = load_model(train(tagged, tmp_path / "whole", values).model)[1]
    wrote, write = [], training.cam_stage.write_label

    def stopping(path, *rest):
        if len(wrote) == 2:
            raise KeyboardInterrupt
        wrote.append(path)
        write(path, *rest)

    class Stopped(training.cam_stage.Trainer):
        def run(self, resume=False, show=True):
            evaluate = self._step

            def step(*arguments):
                if self._iteration == 2:
                    self._save(arguments[1])
                    raise KeyboardInterrupt
                evaluate(*arguments)

            self._step = step
            return super().run(resume, show)

    with monkeypatch.context() as patch:
        patch.setattr(training.cam_stage, *(("write_label", stopping) if stop == "labels" else ("Trainer", Stopped)))
        with pytest.raises(KeyboardInterrupt):
            train(tagged, tmp_path / "run", values)
    assert (tmp_path / "run" / STAGE / CHECKPOINT).is_file()
    with pytest.raises(TrainingError, match="unfinished"):
        train(tagged, tmp_path / "run", values)
    again = load_model(train(tagged, tmp_path / "run", values, resume=True).model)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_supervision_and_method_must_fit(tagged, tmp_path, values):
    with pytest.raises(RecipeError, match="'supervised' learns from masks"):
        train(tagged, tmp_path / "run", values | {"method": {"name": "supervised"}})
    source = open_dataset(tagged)
    recipe = resolve_recipe(source, "masks", [values | {"method": {"name": "tscd"}}])
    with pytest.raises(RecipeError, match="'tscd' learns from tags"):
        run(recipe, source, tmp_path / "other", show=False)
    assert resolve_recipe(source, "tags", [values]).method.name in ("tags", "tscd", "sfc")


def test_tags_need_a_background(tmp_path, values):
    data = write_tagged(tmp_path / "data", ("dark", "red", "green", "blue"))
    with pytest.raises(DataError, match="needs a class 'background' first"):
        train(data, tmp_path / "run", values)


def test_tag_counts(tagged):
    source = open_dataset(tagged)
    assert tag_counts(source, source.splits["train"]) == (2, 1, 0)


# --- the single stage on batches -------------------------------------------------------------------------------


def network(encoder="test_vit"):
    torch.manual_seed(0)
    return build_network(Architecture(encoder=encoder, decoder_width=16), 4)


def batch(tags, size=64):
    torch.manual_seed(1)
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[1, 40:] = False
    image = torch.rand(2, 3, size, size) * 2 - 1
    return Batch(
        image,
        torch.full((2, size, size), 255),
        valid,
        torch.tensor(tags, dtype=torch.float32),
        torch.zeros(2, len(tags[0]), dtype=torch.bool),
    )


def tscd(net, **options):
    small = {"samples": 4, "start": 0.1, "cams": {"scales": [1.0, 0.5]}, **options}
    settings = TypeAdapter(MethodSettings).validate_python({"name": "tscd", **small})
    cams = None
    if isinstance(settings.cams, SharedFeatureSettings):
        cams = SharedFeatureCams(settings.cams, net.encoder, 4, 64, (5, 2, 1), 3.0)
    return build_method(settings, 4, HALF, None, net.encoder, cams=cams)


CAM_KINDS = pytest.mark.parametrize(
    "cams", [{"scales": [1.0, 0.5]}, {"kind": "shared_feature", **SHARED}], ids=["classifier", "shared"]
)


NAN = float("nan")
PRESENT = [[NAN, 1, 0, 1], [NAN, 0, 1, 0]]


@CAM_KINDS
def test_terms_switch_on_and_train_everything(cams):
    net = network()
    method = tscd(net, regulariser_weight=0.01, cams=cams)
    learnt = {"classification", "prototype", "scale"} if "kind" in cams else {"classification"}
    assert set(method(net, batch(PRESENT), 0.05)) == learnt
    terms = method(net, batch(PRESENT), 0.5)
    assert set(terms) == learnt | {"segmentation", "affinity", "correspondence", "consistency", "gated_crf"}
    sum(terms.values()).backward()
    for name, parameter in [*method.named_parameters(), *net.decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert net.training, "taking CAMs leaves the network in training mode"


def test_the_threshold_of_corrections_may_fall(monkeypatch):
    seen = []

    def correct(labels, logits, tags, valid, threshold):
        seen.append(threshold)
        return labels

    monkeypatch.setattr("training.methods.pseudo_labels.corrected_labels", correct)
    net = network()
    for final, expected in ((None, [0.9, 0.9, 0.9]), (0.5, [0.9, 0.7, 0.5])):
        settings = TypeAdapter(MethodSettings).validate_python(
            {"name": "tags", "correction": {"start": 0.2, "threshold": 0.9, "final_threshold": final}}
        )
        method = build_method(settings, 4, HALF, None, net.encoder)
        method.set_teacher(network())
        seen.clear()
        for progress in (0.1, 0.2 + 1e-9, 0.6, 1 - 1e-9):
            method(net, batch(PRESENT), progress)
        assert seen == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValidationError, match="expected it to fall"):
        TypeAdapter(MethodSettings).validate_python(
            {"name": "tags", "correction": {"threshold": 0.5, "final_threshold": 0.9}}
        )


def test_weights_of_zero_leave_their_terms_out():
    net = network()
    off = dict.fromkeys(("affinity_weight", "correspondence_weight", "consistency_weight"), 0)
    assert set(tscd(net, **off)(net, batch(PRESENT), 0.5)) == {"classification", "segmentation"}


def test_shared_features_within_a_single_stage():
    """The bank teaches the classifier alone; the rest of the step sees the batch's own images."""
    net, shared = network(), {"kind": "shared_feature", **SHARED}
    method = tscd(net, cams=shared)
    seen = []
    net.decoder.register_forward_hook(lambda decoder, inputs, output: seen.append(len(inputs[0])))
    alone = SharedFeatureCams(method.settings.cams, net.encoder, 4, 64, (5, 2, 1), 3.0)
    alone.load_state_dict(method.classifier.state_dict())
    for progress in (0.05, 0.5):
        torch.manual_seed(3)
        terms = method(net, batch(PRESENT), progress)
        torch.manual_seed(3)
        for name, term in alone(net, batch(PRESENT), progress).items():
            torch.testing.assert_close(terms[name], term, msg=name)
    assert seen == [2, 2], "the image and its shrunken copy, both without the bank's samples"
    assert method.classifier.bank.filled.all()
    settings = TypeAdapter(MethodSettings).validate_python({"name": "tscd", "cams": shared})
    with pytest.raises(RecipeError, match="knows the training images; give build_method `cams`"):
        build_method(settings, 4, HALF, None, net.encoder)


def test_released_consistency_is_a_constant():
    net = network()
    assert not tscd(net, consistency="parity")(net, batch(PRESENT), 0.5)["consistency"].requires_grad
    method = tscd(net)
    with torch.no_grad():
        for layer in method.classifier.head.classify:
            layer[1].weight.normal_()
    assert method(net, batch(PRESENT), 0.5)["consistency"].requires_grad


@pytest.mark.parametrize(
    "tags", [[[NAN] * 4] * 2, [[NAN, 0, 0, 0]] * 2, [[NAN, 1, 1, 1], [NAN, 0, 0, 0]]], ids=["unknown", "none", "mixed"]
)
@CAM_KINDS
def test_no_nan_whatever_the_tags(tags, cams):
    net = network()
    method = tscd(net, regulariser_weight=0.01, cams=cams)
    terms = method(net, batch(tags), 0.5)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*net.parameters(), *method.parameters()])
    if all(math.isnan(value) for row in tags for value in row):
        learnt = {"classification", "segmentation", "affinity", "prototype", "scale"} & set(terms)
        assert all(terms[name] == 0 for name in learnt)


def test_the_bank_does_not_make_unknown_tags_absent():
    net = network()
    method = SharedFeatureCams(SharedFeatureSettings(**SHARED), net.encoder, 4, 64, (5, 2, 1), 3.0)
    images = method.images(batch([[NAN, 1, NAN, 0], [NAN, 1, NAN, 0]]))
    assert len(images.tags) == 2 + SHARED["bank_draws"], "the batch is in the bank before it is drawn from"
    torch.testing.assert_close(images.tags, torch.tensor([[1, NAN, 0]]).expand(4, 3), equal_nan=True)


def test_coefficients_follow_the_counts_and_the_bank():
    net = network()

    def coefficients(**options):
        settings = SharedFeatureSettings(**SHARED | options)
        return SharedFeatureCams(settings, net.encoder, 4, 64, (50, 20, 1), 3.0).coefficients

    whole = coefficients()
    assert torch.equal(coefficients(coefficients=False), torch.ones(3))
    assert not torch.allclose(coefficients(bank_draws=0), whole, rtol=0.01)
    assert not torch.allclose(coefficients(bank_factor=1.0), whole, rtol=0.01)
    # r = 3 * 3 iterations * 2 draws / 3 classes = 6 beside the counts; D = 79, 49, 68.
    need = torch.tensor([79 / 56, 49 / 26, 68 / 7])
    torch.testing.assert_close(whole, need / need.mean())


@torch.no_grad()
def test_shared_feature_cams_follow_a_flip_and_stay_below_one():
    net = network().eval()
    image, tags = batch(PRESENT).image, torch.tensor(PRESENT)[:, 1:]
    for fusion in (0.0, 0.7, 3.0):
        settings = SharedFeatureSettings(**SHARED | {"fusion": fusion})
        torch.manual_seed(4)
        method = SharedFeatureCams(settings, net.encoder, 4, 64, (5, 2, 1), 3.0)
        straight, mirrored = (method.cams(net.encoder, view, tags) for view in (image, image.flip(3)))
        torch.testing.assert_close(mirrored.flip(3), straight, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(straight, straight.flip(3), atol=1e-2), "its own mirror would show nothing"
        assert 0 <= straight.min() < straight.max() <= 1


@torch.no_grad()
def test_absent_classes_are_smoothed_but_have_no_prototype():
    net = network().eval()
    image, few = batch(PRESENT).image, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    method = SharedFeatureCams(SharedFeatureSettings(**SHARED), net.encoder, 4, 64, (5, 2, 1), 3.0)
    both = torch.cat([image, image.flip(3)])
    smoothed, prototype = method.head.flip_fused(both, net.encoder(both), few)
    of_all, _ = method.head.flip_fused(both, net.encoder(both), torch.ones(2, 3))
    assert torch.equal(smoothed, of_all), "presence takes part after the smoothing"
    assert smoothed[:, 2:].any()
    assert not prototype[:, 2:].any()
    maps = encode(net.encoder, image, method.indices(net.encoder))
    view = method.view_cams(net.encoder, image, maps, torch.ones(2, 64, 64, dtype=torch.bool), few)
    assert not view[:, 1:].any(), "in training they are left out before it"


@torch.no_grad()
def test_biases_take_no_part_in_the_cams_of_a_view():
    net = network().eval()
    method = tscd(net).classifier
    head = method.head
    for layer in head.classify:
        layer[1].weight.normal_()
    image, tags = batch(PRESENT).image, torch.ones(2, 3)
    maps = encode(net.encoder, image, method.indices(net.encoder))
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    before = method.view_cams(net.encoder, image, maps, valid, tags)
    assert before.max() > 0.9
    for layer in head.classify:
        layer[0].bias.fill_(3.0)
        layer[1].bias.fill_(-50.0)
    torch.testing.assert_close(method.view_cams(net.encoder, image, maps, valid, tags), before, rtol=1e-3, atol=1e-4)


def test_the_small_view_has_its_size():
    sizes = []
    for share in (0.3, 0.75):
        net = network()
        net.decoder.register_forward_pre_hook(lambda decoder, given: sizes.append(given[0].shape[-1]))
        tscd(net, small_view=share)(net, batch(PRESENT), 0.5)
    assert sizes == [64, 16, 64, 48]


def test_labels_spread_along_the_learnt_affinity_from_a_start_on(monkeypatch):
    net, seen = network(), []

    def spread(image, cams, tags, valid, affinity, radius, rule):
        seen.append(affinity)
        return torch.full(valid.shape, 255)

    monkeypatch.setattr("training.methods.tscd.propagated_labels", spread)
    method = tscd(net, propagation_start=0.3)
    before, after = (method(net, batch(PRESENT), progress) for progress in (0.2, 0.5))
    assert len(seen) == 1
    assert not seen[0].requires_grad
    assert before["segmentation"] > 0
    assert after["segmentation"] == 0, "the segmentation learns from what was spread"
    assert after["affinity"] > 0, "the affinity does not"
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):  # as training runs
        terms = method(net, batch(PRESENT), 0.5)
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*net.parameters(), *method.parameters()])
    with pytest.raises(ValidationError, match="affinity_weight: 0 leaves out"):
        tscd(net, propagation_start=0.3, affinity_weight=0)
    with pytest.raises(ValidationError, match="no labels before start"):
        tscd(net, propagation_start=0.05)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet10t", "pvt_v2_b0"])
def test_classifiers_on_any_encoder(name):
    encoder = Encoder(name)
    encoder.prune()
    head = CamHead(encoder, 3, (0.5, 1.0), 0.5)
    image = torch.rand(1, 3, 2 * encoder.stride, 3 * encoder.stride)
    maps = head(encode(encoder, image, head.indices))
    assert all(score.shape[:2] == (1, 3) for score in maps.values())
    cams = head.cams(encoder.eval(), image, 1.0, (1.0, 0.5))
    assert cams.shape == (1, 3, *image.shape[-2:])
    assert cams.isfinite().all()


def test_depths_of_a_vit():
    encoder = Encoder("vit_tiny_patch16_224")
    assert [depth_index(encoder, depth) for depth in (0.01, 0.75, 10 / 12, 1.0)] == [0, 8, 9, 11]


@pytest.mark.parametrize(("name", "heads"), [("vit_tiny_patch16_224", 6), ("pvt_v2_b0", 16)])
def test_recorded_attention_is_that_of_the_encoder(name, heads):
    encoder = Encoder(name).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), AttentionTap(encoder) as tap:
        maps = encoder(image)
    positions = maps[-1].shape[-2] * maps[-1].shape[-1]
    logits = tap.logits()
    assert logits.shape == (1, heads, positions, positions)
    affinity = AffinityHead(heads)(logits)
    torch.testing.assert_close(affinity, affinity.transpose(1, 2))
    with torch.no_grad(), tap:
        encoder(image.flip(3))
    assert not torch.equal(tap.logits(), logits)
    encoder(image)
    assert len(tap.pairs()) == 2, "nothing is recorded outside the context"


def test_affinity_needs_attention():
    net = network("resnet10t")
    with pytest.raises(RecipeError, match="no attention over all positions"):
        tscd(net)
    terms = tscd(net, affinity_weight=0)(net, batch(PRESENT), 0.5)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "pvt_v2_b0", "test_convnext"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_freezing_keeps_the_first_layers(name, share):
    encoder = Encoder(name)
    encoder.prune()
    freeze(encoder, share)
    learning = [parameter.requires_grad for parameter in encoder.parameters()]
    assert all(learning) if share == 0 else not learning[0]
    assert any(learning) == (share < 1)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    encoder.train()(torch.rand(2, 3, 64, 64))
    moved = [not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    # PVTv2 and the ViT have none.
    assert moved == [share == 0] * len(norms)
    assert bool(norms) == (name == "resnet10t")


def test_labels_can_be_made_anew_without_training_again(tagged, tmp_path, values):
    folder = tmp_path / "run"
    train(tagged, folder, values | {"method": two_stages()})
    state = (folder / STAGE / CHECKPOINT).read_bytes()
    shutil.rmtree(folder / LABELS)
    (folder / CHECKPOINT).unlink()
    (folder / "model.pt").unlink()
    other = two_stages(labels={"refiner": "off", "high": 0.9, "low": 0.1}, cam_long_side=64)
    train(tagged, folder, values | {"method": other}, resume=True)
    labels = [np.asarray(Image.open(path)) for path in (folder / LABELS).glob("*.png")]
    assert any((label == 255).any() for label in labels)
    assert torch.equal(
        torch.load(folder / STAGE / CHECKPOINT, weights_only=True)["module"]["network.encoder.model.pos_embed"],
        torch.load(io.BytesIO(state), weights_only=True)["module"]["network.encoder.model.pos_embed"],
    )
    (folder / "model.pt").unlink()
    shutil.rmtree(folder / LABELS)
    with pytest.raises(TrainingError, match="another recipe"):
        train(tagged, folder, values | {"method": other | {"cam_learning_rate": 0.5}}, resume=True)


def test_scores_of_cams_and_pseudo_labels(tagged, tmp_path, values):
    folder = tmp_path / "run"
    values["method"] = two_stages()
    train(tagged, folder, values)
    source = open_dataset(tagged)
    names = source.splits["val"]
    found = score_cams(source, resolve_recipe(source, "tags", [values]), folder, names)
    assert 0 <= found["miou"] <= 1
    assert found["background"] in BACKGROUNDS
    truth = tmp_path / "truth"
    truth.mkdir()
    for name in names:
        mask = source.load_labels(name, "masks").copy()
        mask[:2] = 255
        write_label(truth / f"{name}.png", mask, source.palette)
    exact = score_labels(source, truth, names)
    assert exact["miou"] == 1
    assert exact["sure"] == pytest.approx(1 - 2 / SIZE)


@pytest.mark.parametrize(
    "method",
    [two_stages(), two_stages("sfc", cams=SHARED), {"name": "tags", "cams": TOKENS}],
    ids=["classifier", "sfc", "tokens"],
)
def test_the_command_scores_the_first_stage(tagged, tmp_path, values, capsys, method):
    data, folder, values = tmp_path / "data", tmp_path / "run", values | {"method": method}
    shutil.copytree(tagged, data)
    train(data, folder, values)
    # Masks of training images, which no training reads: two of them the very pseudo-labels, a third is another class.
    masks = {name: np.asarray(Image.open(folder / LABELS / f"{name}.png")) for name in ("scene0", "scene1")}
    masks["scene2"] = np.full((SIZE, SIZE), 3, np.uint8)
    for name, mask in masks.items():
        Image.fromarray(mask).save(data / "masks" / f"{name}.png")
    source, names = open_dataset(data), sorted(masks)

    def told(folder, split, *options):
        with pytest.raises(SystemExit) as stop:
            evaluate_command([str(folder), str(data), "--first-stage", "--split", split, *options])
        return stop.value.code, capsys.readouterr()

    code, out = told(folder, "train", "--json")
    assert code == 0
    found = json.loads(out.out)
    assert found["class activation maps"] == score_cams(source, resolve_recipe(source, "tags", [values]), folder, names)
    assert found["pseudo-labels"] == score_labels(source, folder / LABELS, names)
    assert 0 < found["pseudo-labels"]["miou"] < 1
    code, out = told(folder, "train")
    assert code == 0
    assert "pseudo-labels: mIoU 0." in out.out
    # Nothing is trained or written, not even where the classifier is gone.
    before = sorted(path for path in folder.rglob("*"))
    assert told(folder, "train", "--device", "cpu")[0] == 0
    assert sorted(path for path in folder.rglob("*")) == before
    assert "--refine" in told(folder, "train", "--refine")[1].err
    shutil.move(folder / STAGE / CHECKPOINT, tmp_path / "kept.pt")
    assert told(folder, "train")[0] == 1
    assert not (folder / STAGE / CHECKPOINT).exists()
    shutil.move(tmp_path / "kept.pt", folder / STAGE / CHECKPOINT)
    code, out = told(folder, "val")
    assert code == 1
    assert "no image with a mask has tags or a pseudo-label" in out.err
    code, out = told(data, "train")
    assert code == 1
    assert "takes the folder (--out) of a training from tags" in out.err


@CAM_KINDS
def test_a_single_stage_is_scored_as_it_ended(tagged, tmp_path, values, capsys, cams):
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tagged, data)
    values["method"] = {"name": "tscd", "start": 0.3, "samples": 4, "cams": cams, "labels": {"high": 0.4}}
    train(data, folder, values)
    shutil.copy(data / "masks" / "scene9.png", data / "masks" / "scene3.png")
    Image.fromarray(np.ones((SIZE, SIZE), np.uint8)).save(data / "masks" / "scene1.png")
    source = open_dataset(data)
    recipe = resolve_recipe(source, "tags", [values])
    encoder, method = finished_classifier(recipe, folder, len(source.classes))
    state = torch.load(folder / CHECKPOINT, weights_only=True)["module"]
    for module, prefix in ((encoder, "network.encoder."), (method.head, "method.classifier.head.")):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, state[prefix + name], rtol=0, atol=0)
    with pytest.raises(SystemExit) as stop:
        evaluate_command([str(folder), str(data), "--first-stage", "--split", "train", "--json"])
    assert stop.value.code == 0
    names = ["scene1", "scene3"]
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "class activation maps": score_cams(source, recipe, folder, names),
        "pseudo-labels": score_made_labels(source, recipe, folder, names),
    }
    # A run of before the classifier could be of several kinds has its tensors elsewhere.
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    moved = {name.replace("method.classifier.head.", "method.head."): t for name, t in content["module"].items()}
    torch.save(content | {"module": moved}, folder / CHECKPOINT)
    assert score_cams(source, recipe, folder, names) == told["class activation maps"]


@pytest.mark.parametrize("share", [0.0, 1 / 3])
def test_the_first_layers_of_a_single_stage_stay_as_they_are(tagged, tmp_path, values, share):
    values["method"] = {"name": "tscd", "start": 0.3, "samples": 4, "cams": {"scales": [1.0]}, "frozen": share}
    train(tagged, tmp_path / "run", values)
    recipe = resolve_recipe(open_dataset(tagged), "tags", [values])
    torch.manual_seed(recipe.seed)
    before = build_network(recipe.model.architecture, 4, weights="none").encoder.state_dict()
    encoder, _ = finished_classifier(recipe, tmp_path / "run", 4)
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert ("model.patch_embed.proj.weight" in moved) == (share == 0)
    assert any("blocks.5" in name for name in moved)


def test_a_checkpoint_of_a_version_without_an_option_says_so(tagged, tmp_path, values):
    values["method"] = {"name": "tscd", "start": 0.3, "samples": 4, "cams": {"scales": [1.0]}}
    train(tagged, tmp_path / "run", values)
    path = tmp_path / "run" / CHECKPOINT
    content = torch.load(path, weights_only=True)
    del content["recipe"]["method"]["frozen"]
    torch.save(content | {"digest": "of another version"}, path)
    (tmp_path / "run" / "model.pt").unlink()
    with pytest.raises(TrainingError, match=r"a version of this package without method\.frozen; start a new run"):
        train(tagged, tmp_path / "run", values, resume=True)
    # Also one whose default is nothing.
    del content["recipe"]["method"]["propagation_start"]
    torch.save(content | {"digest": "of another version"}, path)
    with pytest.raises(TrainingError, match=r"without method\.frozen, method\.propagation_start; start"):
        train(tagged, tmp_path / "run", values, resume=True)
