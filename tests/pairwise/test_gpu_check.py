"""The program that checks everything on a GPU, tried out on the CPU: no part of it fails before it reaches one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so():
    done = check()
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
