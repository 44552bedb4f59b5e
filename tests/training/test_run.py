from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from training.data.dataset import open_dataset
from training.recipe import dump_recipe
from training.run import RECORD, resolve_recipe, run
from training.state import CHECKPOINT
from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model
from wsss_deploy.errors import DataError, RecipeError, TrainingError

METHODS = [("masks", "supervised"), ("scribbles", "partial_ce"), ("scribbles", "gated_crf")]


def train(data, out, values, supervision="scribbles", resume=False):
    source = open_dataset(data)
    return run(resolve_recipe(source, supervision, [values]), source, out, resume, show=False)


def state_of(out):
    return load_model(out / "model.pt")[1]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("supervision", "method"), METHODS)
def test_a_run_leaves_a_model_and_its_record(squares, tmp_path, small, supervision, method):
    result = train(squares, tmp_path / "run", small | {"method": {"name": method}}, supervision)
    card, state = load_model(result.model)
    assert card.classes == ("dark", "bright")
    assert card.protocol.method == method
    assert card.protocol.supervision == (supervision,)
    assert card.protocol.selection == "best-val-miou"
    assert not card.protocol.simulated
    assert card.sizing.long_side == 64, "1.6 times the crop of 48, to a multiple of 32"
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["evaluation"]["miou"] == pytest.approx(card.protocol.metrics["val_miou"])
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    with (tmp_path / "run" / "log.csv").open() as handle:
        figures = {row["figure"] for row in csv.DictReader(handle)}
    assert {"loss/total", "val/miou", "learning_rate", "images_per_second"} <= figures


@pytest.mark.slow
def test_training_learns(squares, tmp_path, small):
    values = small | {"optimisation": {"iterations": 60, "batch_size": 4, "learning_rate": 2e-3}}
    assert train(squares, tmp_path / "run", values).trained.result.miou > 0.9


def test_the_saved_model_predicts_what_the_run_reported(squares, tmp_path, small):
    from training.evaluate import evaluate

    result = train(squares, tmp_path / "run", small)
    source = open_dataset(squares)
    again = evaluate(Segmenter(result.model, refine=False), source, source.splits["val"], "val")
    assert again.confusion == result.trained.result.confusion
    record = json.loads((tmp_path / "run" / "run.json").read_text())["refinement"]
    refined = evaluate(Segmenter(result.model), source, source.splits["val"], "val")
    assert refined.miou == pytest.approx(record["candidates"][record["chosen"]]["miou"], abs=1e-9)


def test_equal_seeds_give_equal_tensors_and_others_differ(squares, tmp_path, small):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(squares, tmp_path / name, small | {"seed": seed})
    assert equal(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    assert not equal(state_of(tmp_path / "a"), state_of(tmp_path / "c"))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(squares, tmp_path, small, monkeypatch, ema):
    from training.trainer import Trainer

    values = small | {"model": small["model"] | {"drop_path": 0.2}}
    values["optimisation"] = values["optimisation"] | {"ema": ema}
    train(squares, tmp_path / "whole", values)

    step = Trainer._step

    def stop_in_the_fifth(self, *arguments):
        step(self, *arguments)
        if self._iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop_in_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            train(squares, tmp_path / "halves", values)
    assert not (tmp_path / "halves" / "model.pt").exists()
    stopped = torch.load(tmp_path / "halves" / CHECKPOINT, weights_only=True)
    assert stopped["seconds"] > 0
    stopped["seconds"] += 1000
    torch.save(stopped, tmp_path / "halves" / CHECKPOINT)
    train(squares, tmp_path / "halves", values, resume=True)
    assert json.loads((tmp_path / "halves" / RECORD).read_text())["training_seconds"] > 1000
    assert equal(state_of(tmp_path / "whole"), state_of(tmp_path / "halves"))
    with (tmp_path / "whole" / "log.csv").open() as one, (tmp_path / "halves" / "log.csv").open() as two:
        drop = ("images_per_second",)
        rows = [
            [r for r in csv.DictReader(f) if r["figure"] not in drop and "loss" not in r["figure"]] for f in (one, two)
        ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_checkpoint(squares, tmp_path, small):
    values = small | {"optimisation": {"iterations": 120, "batch_size": 2}, "checkpoint_every": 0.1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "training.cli", str(squares), "--supervision", "scribbles", "--out", str(out)]
    process = subprocess.Popen([*command, "--recipe", str(recipe)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (out / "model.pt").exists()
    again = subprocess.run([*command, "--recipe", str(recipe)], capture_output=True, text=True)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    done = subprocess.run([*command, "--resume", "--set", "checkpoint_every=60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed after iteration" in done.stderr
    assert (out / "model.pt").is_file()


def test_a_run_killed_before_its_first_checkpoint_starts_over(squares, tmp_path, small, caplog):
    train(squares, tmp_path / "whole", small)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "recipe.yaml").write_text((tmp_path / "whole" / "recipe.yaml").read_text())
    with caplog.at_level("INFO"):
        train(squares, killed, small, resume=True)
    assert "starting from the beginning" in caplog.text
    assert equal(state_of(tmp_path / "whole"), state_of(killed))


def test_sizes_off_the_encoders_grid_are_refused(squares, tmp_path, small):
    with pytest.raises(RecipeError, match=r"augmentation\.size: 100 is no multiple of 16.*use 96 or 112"):
        train(squares, tmp_path / "run", small | {"augmentation": {"size": 100}})
    assert not (tmp_path / "run").exists()


def test_resume_is_told_apart_from_other_things(squares, tmp_path, small):
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        train(squares, tmp_path / "new", small, resume=True)
    train(squares, tmp_path / "done", small)
    with pytest.raises(TrainingError, match="finished run"):
        train(squares, tmp_path / "done", small)
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(squares, tmp_path / "done", small, resume=True)
    (tmp_path / "done" / "model.pt").unlink()
    changed = small | {"optimisation": small["optimisation"] | {"learning_rate": 5e-4}}
    with pytest.raises(TrainingError, match=r"differs in optimisation\.learning_rate"):
        train(squares, tmp_path / "done", changed, resume=True)
    (tmp_path / "done" / CHECKPOINT).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(TrainingError, match="damaged"):
        train(squares, tmp_path / "done", small, resume=True)


def test_fine_tuning_starts_from_a_models_encoder(squares, tmp_path, small):
    train(squares, tmp_path / "first", small)
    weights = {"model": small["model"] | {"weights": str(tmp_path / "first" / "model.pt")}}
    values = small | weights | {"optimisation": {"iterations": 1, "batch_size": 1, "learning_rate": 1e-9}}
    train(squares, tmp_path / "second", values)
    first, second = state_of(tmp_path / "first"), state_of(tmp_path / "second")
    encoder = [key for key in first if key.startswith("encoder.")]
    assert encoder
    for key in encoder:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-6)


def test_without_validation_masks_the_last_state_is_kept(tmp_path, small, make_set):
    data = make_set(tmp_path / "unmasked", kinds=("scribbles",))
    result = train(data, tmp_path / "run", small)
    assert result.trained.selection == "last"
    assert result.trained.result is None


def test_missing_labels_are_simulated_aloud_or_refused(tmp_path, small, caplog, make_set):
    data = make_set(tmp_path / "masked", kinds=("masks",))
    with caplog.at_level("WARNING"):
        result = train(data, tmp_path / "run", small)
    assert "simulating" in caplog.text
    assert load_model(result.model)[0].protocol.simulated
    with pytest.raises(DataError, match="no masks to simulate"):
        train(make_set(tmp_path / "scribbled", kinds=("scribbles",)), tmp_path / "other", small, "points")


def test_an_unknown_split_names_the_known_ones(squares, tmp_path, small):
    with pytest.raises(DataError, match="splits: train, val"):
        train(squares, tmp_path / "run", small | {"train_split": "training"})


@pytest.mark.parametrize(
    ("kept", "extra", "kind", "method"),
    [
        (["points"], [], "points", "gated_crf"),
        (["scribbles"], [], "scribbles", "gated_crf"),
        (["masks", "points"], [], "masks", "supervised"),
        (["tags"], [], "tags", "tags"),
        (["points", "tags"], [], "points", "gated_crf"),
        (["scribbles", "points"], [], "auto", "gated_crf"),
        (["points"], ["masks"], "auto", "gated_crf"),
        (["points"], ["tags"], "points", "gated_crf"),
    ],
)
def test_auto_is_the_one_kind_of_label_that_there_is(kept, extra, kind, method, caplog):
    """Each kind has defaults of its own, which a data set with nothing else should get without asking."""
    names = ("a", "b", "c")
    found = {"a": frozenset(kept), "b": frozenset(extra or kept), "c": frozenset()}
    source = SimpleNamespace(
        name="mine", classes=("background", "cat"), splits={"train": names}, kinds=lambda name: found[name]
    )
    recipe = resolve_recipe(source, None, [])
    assert (recipe.supervision, recipe.method.name) == (kind, method)
    if kind == "points":
        assert recipe == resolve_recipe(source, "points", [])
        assert recipe.method.propagate is not None


def test_auto_leaves_labels_alone_that_a_named_method_cannot_learn_from(squares):
    tagged = SimpleNamespace(
        name="mine", classes=("background", "cat"), splits={"train": ("a",)}, kinds=lambda name: frozenset({"tags"})
    )
    assert resolve_recipe(tagged, "auto", [{"method": {"name": "partial_ce"}}]).supervision == "auto"
    assert resolve_recipe(tagged, "auto", [{"method": {"name": "tscd"}}]).supervision == "tags"
    # Strokes that somebody calls masks: the method has the values that it has for scribbles.
    masks = SimpleNamespace(**vars(tagged) | {"kinds": lambda name: frozenset({"masks"})})
    found, scribbles = (
        resolve_recipe(masks, kind, [{"method": {"name": "gated_crf"}}]) for kind in ("auto", "scribbles")
    )
    assert found.supervision == "masks"
    assert found.method == scribbles.method
    assert resolve_recipe(masks, "auto", []).method.name == "supervised"


def test_a_run_goes_on_with_its_own_kind_of_label_whatever_has_been_added(squares, tmp_path, small):
    """Recipes that were saved as "auto" stay so, too."""
    source = open_dataset(squares)
    for saved in ("auto", "scribbles"):
        before = resolve_recipe(source, saved, [small | {"method": {"name": "partial_ce"}}]).model_dump(mode="json")
        before["supervision"] = saved
        for asked in (None, "auto"):
            recipe = resolve_recipe(source, asked, [before, {}], resumed=True)
            assert recipe.model_dump(mode="json") == before
    assert resolve_recipe(source, "masks", [before], resumed=True).supervision == "masks"


@pytest.mark.parametrize(
    ("size", "stride", "words"),
    [
        (48, 5, r"method.stride: 5 does not divide the crop's 48 pixels .*use 4 or 6"),
        (48, 48, r"method.stride: 48 leaves a single pixel of a crop of 48 .*use 24$"),
        (64, 5, r"use 4 or 8$"),
        (50, 4, r"augmentation.size: 50 is no multiple of .*use 48 or"),
    ],
)
def test_a_stride_that_does_not_fit_the_crop_is_refused_before_the_training(
    squares, tmp_path, small, size, stride, words
):
    values = small | {"method": {"name": "gated_crf", "stride": stride}, "augmentation": {"size": size}}
    with pytest.raises(RecipeError, match=words):
        train(squares, tmp_path / "run", values)


def test_a_class_matrix_has_a_row_for_every_class_before_anything_is_made(squares, tmp_path, small):
    values = small | {"method": {"name": "gated_crf", "compatibility": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]}}
    with pytest.raises(RecipeError, match="has 3 rows, expected one for each of 2 classes"):
        train(squares, tmp_path / "run", values)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_an_average_is_refused_before_anything_is_made(squares, tmp_path, small):
    values = small | {"optimisation": small["optimisation"] | {"ema": 0}}
    with pytest.raises(RecipeError, match=r"method.teacher: needs a moving average.*method.teacher=null"):
        train(squares, tmp_path / "run", values | {"method": {"name": "gated_crf", "teacher": {}}}, "points")
    assert not (tmp_path / "run").exists()
    # Nobody asked for the one of the default.
    assert resolve_recipe(open_dataset(squares), "points", [small]).method.teacher is not None
    assert resolve_recipe(open_dataset(squares), "points", [values]).method.teacher is None


def test_the_resolved_recipe_repeats_the_run(squares, tmp_path, small):
    train(squares, tmp_path / "a", small)
    values = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    source = open_dataset(squares)
    recipe = resolve_recipe(source, None, [values])
    assert dump_recipe(recipe) == (tmp_path / "a" / "recipe.yaml").read_text()
