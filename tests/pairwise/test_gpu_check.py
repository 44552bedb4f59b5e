"""The program that checks everything on a GPU, tried out on the CPU: no part of it fails before it reaches one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import Machine

ROOT = Path(__file__).parents[2]


def check(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    sections = ("pairwise", "energy", "step", "network", "runtimes")
    done = check("--device", "cpu", "--only", *sections, "--json", str(tmp_path / "report.json"), "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["section"] for row in report["rows"] if row["name"] == "failed"] == []
    assert {row["section"] for row in report["rows"]} == set(sections)
    assert "dry run" in report["device"]


def test_a_device_without_a_number_becomes_the_current_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", asked.append, raising=False)
    monkeypatch.setattr(Machine, "_copy_bandwidth", lambda self: 1.0)
    assert Machine(torch.device("cuda")).device == torch.device("cuda", 0)
    assert Machine(torch.device("cuda:1")).device == torch.device("cuda", 1)
    assert asked == [0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so():
    done = check()
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
