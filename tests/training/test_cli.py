"""What `wsss-train` says: its help, how a stopped run goes on, and which runs are not its to resume."""

from __future__ import annotations

import json
import os
import shlex
import signal
from typing import get_args

import pytest
import torch

import training.cli
from training.methods.settings import MethodSettings
from training.recipes import packaged_recipes
from training.state import CHECKPOINT
from training.trainer import Trainer
from wsss_deploy import Segmenter
from wsss_deploy.errors import ArtifactError


def call(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        training.cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def options(small) -> list[str]:
    """A recipe's values on the command line."""
    pairs = [part for key, value in small.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return ["--quiet", *pairs]


def stop_after(monkeypatch, iterations: int, number: int) -> None:
    step = Trainer._step

    def stopping(self, *arguments):
        step(self, *arguments)
        if self._iteration == iterations:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_step", stopping)


def test_help_names_all_methods_and_packaged_recipes(capsys):
    status, text, _ = call(capsys, "--help")
    assert status == 0
    words = text.replace(",", " ").split()
    (union, _) = get_args(MethodSettings)
    methods = {settings.model_fields["name"].default for settings in get_args(union)}
    assert methods == set(training.cli.METHODS)
    assert methods <= set(words)
    assert set(packaged_recipes()) <= set(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_it_goes_on(make_set, tmp_path, small, capsys, monkeypatch, number):
    data, out = make_set(tmp_path / "my photos"), tmp_path / "runs" / "first"
    with monkeypatch.context() as patched:
        stop_after(patched, 3, number)
        arguments = ("--supervision", "scribbles", "--format", "folder", "--out", out)
        status, _, errors = call(capsys, data, *arguments, *options(small))
    assert status == 130
    said = f"wsss-train: interrupted; go on with: wsss-train '{data}' --out {out} --resume --format folder"
    assert errors.splitlines()[-1] == said
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: is the training state of a run"):
        Segmenter(out / CHECKPOINT)
    program, *command = shlex.split(said.partition("go on with: ")[2])
    assert program == "wsss-train"
    status, text, errors = call(capsys, *command, "--quiet")
    assert status == 0, errors
    assert (out / "model.pt").is_file()
    assert text


def test_a_run_that_cannot_be_resumed_does_not_say_so(squares, tmp_path, small, capsys, monkeypatch):
    """Stopped before it has written anything, also where another run has left its recipe."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.build_network", stopped)
    for _ in range(2):
        status, _, errors = call(capsys, squares, "--out", tmp_path / "run", *options(small))
        assert status == 130
        assert errors.splitlines()[-1] == "wsss-train: interrupted"
        (tmp_path / "run" / "recipe.yaml").write_text("supervision: points\n")


@pytest.mark.parametrize(("there", "asked"), [("sfc", "tscd"), ("tscd", "sfc"), ("partial_ce", "gated_crf")])
@pytest.mark.parametrize("state", [CHECKPOINT, f"cams/{CHECKPOINT}", None])
def test_another_methods_run_is_not_resumed(squares, tmp_path, capsys, there, asked, state):
    run = tmp_path / "run"
    recipe = f"supervision: {'scribbles' if there == 'partial_ce' else 'tags'}\nmethod: {{name: {there}}}\n"
    (run / "cams").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe)
    if state is not None:
        torch.save({}, run / state)
    status, _, errors = call(capsys, squares, "--out", run, "--method", asked, "--resume")
    assert status == 1
    assert errors.startswith(f"wsss-train: {run}: the run there is one of '{there}', this one asks for '{asked}';")
    assert (run / "recipe.yaml").read_text() == recipe


def test_classifiers_that_carry_labels_serve_another_method(squares, tmp_path, capsys, monkeypatch):
    """Their folder is this method's, too (`training.propagation_stage.check_carried`)."""
    run = tmp_path / "run"
    (run / "cams").mkdir(parents=True)
    (run / "recipe.yaml").write_text("supervision: scribbles\nmethod: {name: partial_ce, propagate: {}}\n")
    torch.save({}, run / "cams" / CHECKPOINT)

    def reached(recipe, *_):
        raise KeyboardInterrupt(recipe.method.name)

    monkeypatch.setattr("training.run.run", reached)
    arguments = ("--resume", "--set", "method={name: gated_crf, propagate: {}}")
    assert call(capsys, squares, "--out", run, *arguments)[0] == 130
    torch.save({}, run / CHECKPOINT)
    status, _, errors = call(capsys, squares, "--out", run, *arguments)
    assert status == 1
    assert "one of 'partial_ce', this one asks for 'gated_crf'" in errors
