"""The series of runs on real images: what is kept is not trained again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import real_data
from benchmarks.real_data import SETTINGS, run, summarise
from training.recipe import parse_assignments

SETTING = next(setting for setting in SETTINGS if setting.name == "voc-scribbles-default")
RECORD = {
    "evaluation": {
        "miou": 0.7,
        "foreground_miou": 0.65,
        "mean_boundary_iou": 0.4,
        "foreground_dice": 0.8,
        "protocol": {"resolution": "long side 416 px"},
        "confusion": [[1, 2], [3, 4]],
    },
    "recipe": {"optimisation": {"batch_size": 8, "iterations": 500}},
    "training_seconds": 12.3,
    "threads": 1,
    "versions": {"torch": "2.15.0", "numpy": "2"},
}


@pytest.fixture
def trained(monkeypatch):
    """Seeds that were trained; a training writes a record whose mIoU is the seed."""
    seeds = []

    def train(command, **_):
        folder, seed = Path(command[command.index("--out") + 1]), int(command[command.index("--seed") + 1])
        seeds.append(seed)
        folder.mkdir(parents=True)
        evaluation = RECORD["evaluation"] | {"miou": seed}
        (folder / "run.json").write_text(json.dumps(RECORD | {"evaluation": evaluation}))

    monkeypatch.setattr(real_data.subprocess, "run", train)
    return seeds


def options(out, kept=None, keep=False, iterations=500):
    return SimpleNamespace(out=out, shared=Path("shared"), iterations=iterations, size=256, kept=kept, keep=keep)


def test_kept_runs_are_not_trained_again(tmp_path, trained):
    kept = tmp_path / "runs.json"
    for seed in (0, 1):
        first = run(SETTING, seed, options(tmp_path / "a", kept, keep=True))
    assert "confusion" not in first["evaluation"]
    assert set(json.loads(kept.read_text())) == {"voc-scribbles-default-0", "voc-scribbles-default-1"}
    assert trained == [0, 1]
    again = [run(SETTING, seed, options(tmp_path / "b", kept)) for seed in (0, 1)]
    assert (trained, again[1]) == ([0, 1], first)
    assert summarise(SETTING, again)["values"] == [0, 1]


def test_runs_of_another_length_and_without_the_file_are(tmp_path, trained):
    kept = tmp_path / "runs.json"
    run(SETTING, 0, options(tmp_path / "a", kept, keep=True))
    run(SETTING, 0, options(tmp_path / "b", kept, keep=True, iterations=1500))
    assert "voc-scribbles-default-0 of 1500 iterations at 256 px" in json.loads(kept.read_text())
    run(SETTING, 0, options(tmp_path / "c"))
    assert trained == [0, 0, 0]


def test_series_beside_each_other_keep_both(tmp_path, trained):
    kept = tmp_path / "runs.json"
    names = [f"voc-scribbles-default-{seed}" for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: run(SETTING, seed, options(tmp_path / str(seed), kept, keep=True)), range(8)))
    assert list(json.loads(kept.read_text())) == names
    assert [path.name for path in tmp_path.glob("runs*")] == ["runs.json"]


def test_every_setting_says_its_rates_and_has_the_twin_of_them(tmp_path, monkeypatch):
    seen = {}

    def train(command, **_):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(RECORD))
        seen[folder.name] = parse_assignments(
            [value for key, value in pairwise(command) if key == "--set" and value.startswith("optimisation.")]
        )["optimisation"]

    monkeypatch.setattr(real_data.subprocess, "run", train)
    for setting in real_data.SETTINGS:
        run(setting, 0, options(tmp_path))
    for setting in real_data.SETTINGS:
        falling = setting.name.endswith("-layers")
        assert seen[f"{setting.name}-0"]["layer_decay"] == (0.75 if falling else 1), setting.name
        assert seen[f"{setting.name}-0"] == seen[f"{real_data.twin_of(setting.name)}-0"]


def test_mistakes_are_told(tmp_path, trained, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--keep needs --kept"):
        run(SETTING, 0, options(tmp_path, keep=True))
    monkeypatch.setattr(real_data.sys, "argv", ["real_data", "--settings", "voc-scribble-default"])
    with pytest.raises(SystemExit):
        real_data.main()
    assert "no setting voc-scribble-default; there are voc-masks," in capsys.readouterr().err
    assert trained == []
