"""Whole runs of the methods for sparse labels: resumed with their heads, saved without, exported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from training.data.dataset import open_dataset
from training.run import resolve_recipe, run
from training.state import CHECKPOINT
from training.trainer import Trainer
from wsss_deploy import Segmenter
from wsss_deploy.artifact import load_model
from wsss_deploy.errors import RecipeError

DFR = {"name": "dfr", "head_width": 8, "auxiliary_weight": 0.4, "deep_start": 0.3, "threshold": 0.5}

pytestmark = pytest.mark.usefixtures("one_thread")


def train(data, out, values, resume=False):
    source = open_dataset(data)
    return run(resolve_recipe(source, "scribbles", [values]), source, out, resume, show=False)


@pytest.mark.parametrize(
    "method",
    [
        DFR | {"teacher": {"threshold": 0.5, "start": 0}},
        {"name": "soft_labels", "start": 0, "steps": 3},
        {"name": "partial_ce", "spread": {}, "teacher": {"threshold": 0.5, "start": 0}},
    ],
    ids=lambda method: method["name"],
)
def test_a_stopped_run_goes_on_with_its_head_and_teacher(squares, tmp_path, small, monkeypatch, method):
    values = small | {"method": method}
    values["optimisation"] = values["optimisation"] | {"ema": 0.9}
    train(squares, tmp_path / "whole", values)
    step = Trainer._step

    def stop_in_the_fourth(self, *arguments):
        step(self, *arguments)
        if self._iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop_in_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train(squares, tmp_path / "halves", values)
    kept = torch.load(tmp_path / "halves" / CHECKPOINT, weights_only=True)["module"]
    heads = {name.split(".")[1] for name in kept if name.startswith("method.")}
    assert heads == ({"head", "auxiliary"} if method["name"] == "dfr" else set())
    train(squares, tmp_path / "halves", values, resume=True)
    first, second = (load_model(tmp_path / name / "model.pt")[1] for name in ("whole", "halves"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_head_is_trained_and_left_out_of_the_model(squares, tmp_path, small):
    result = train(squares, tmp_path / "run", small | {"method": DFR})
    card, state = load_model(result.model)
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder"}
    assert card.protocol.method == "dfr"
    trained = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["module"]
    again = tmp_path / "again"
    train(squares, again, small | {"method": DFR, "optimisation": small["optimisation"] | {"iterations": 1}})
    early = torch.load(again / CHECKPOINT, weights_only=True)["module"]
    heads = [name for name in trained if name.startswith("method.head") and trained[name].ndim > 1]
    assert heads
    assert all(not torch.equal(trained[name], early[name]) for name in heads)
    image = np.zeros((48, 64, 3), np.uint8)
    assert Segmenter(result.model).predict(image).mask.shape == (48, 64)


def test_a_teacher_without_an_average_is_refused(squares, tmp_path, small):
    values = small | {"method": {"name": "partial_ce", "teacher": {}}}
    values["optimisation"] = values["optimisation"] | {"ema": 0.0}
    with pytest.raises(RecipeError, match=r"optimisation\.ema above 0"):
        train(squares, tmp_path / "run", values)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_trained_with_dfr_and_upernet_is_exported(squares, tmp_path, small):
    values = small | {"method": DFR | {"features": "decoder"}, "model": small["model"] | {"decoder": "upernet"}}
    result = train(squares, tmp_path / "run", values)
    done = subprocess.run([sys.executable, "-m", "export.cli", str(result.model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx", providers=["CPUExecutionProvider"])
    for size in ((30, 70), (64, 48)):
        (scores, _) = session.run(None, {"image": np.zeros((1, *size, 3), np.uint8)})[:2]
        assert scores.shape == (1, 2, *size)
