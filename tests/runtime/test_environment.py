"""CPUs that a process may use: affinity, and the quotas of control groups, here in made-up files."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from wsss_deploy import Segmenter, environment
from wsss_deploy.cli.doctor import main
from wsss_deploy.environment import cpu_quota, cpu_threads
from wsss_deploy.pairwise import api, native
from wsss_deploy.refinement import DEFAULT, Refiner


def groups(root, listed, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(listed)
    for place, text in files.items():
        path = root / "sys/fs/cgroup" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(root)


ONE = "4:memory:/a\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n"
CASES = {
    "none": ("0::/\n", {}, None),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, in a group": ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
    "version 2, the group around it is smaller": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 1", "a/cpu.max": "50000 100000"},
        0.5,
    ),
    "version 2, of another group": ("0::/a\n", {"b/cpu.max": "50000 100000\n"}, None),
    "version 1": (ONE, {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2),
    "version 1, in a group": (
        ONE,
        {"cpu/docker/abc/cpu.cfs_quota_us": "30000\n", "cpu/docker/abc/cpu.cfs_period_us": "10000\n"},
        3,
    ),
    "version 1, no limit": (ONE, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    "both": (
        f"{ONE}0::/\n",
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000", "cpu.max": "100000 100000"},
        1,
    ),
    "damaged": ("0::/\nx\n\n3:cpu\n", {"cpu.max": "many\n"}, None),
    "no period": ("0::/\n", {"cpu.max": "100000 0\n"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas(tmp_path, case):
    listed, files, expected = CASES[case]
    assert groups(tmp_path, listed, files) == expected


def test_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (0.2, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_threads_are_the_smaller_of_both(monkeypatch, quota, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert cpu_threads() == threads


def test_onnxruntime_and_the_refinement_keep_to_the_quota(color_onnx, monkeypatch, capsys):
    ort = pytest.importorskip("wsss_deploy.backends.onnxruntime_backend")
    monkeypatch.setattr(ort, "thread_limit", lambda: 3)
    segmenter = Segmenter(color_onnx, device="cpu")
    assert segmenter.describe()["threads"] == 3
    assert segmenter.runtime._session.get_session_options().intra_op_num_threads == 3
    assert Segmenter(color_onnx, device="cpu", threads=2).describe()["threads"] == 2
    with pytest.raises(SystemExit):
        main([str(color_onnx), "--device", "cpu"])
    assert re.search(r"ran in onnxruntime .*, CPU threads: 3\n", capsys.readouterr().out)
    asked = []

    def noted(parameters, masks, guide, unary, out, threads, compact):
        asked.append(threads)
        out[:] = masks

    monkeypatch.setattr(api, "cpu_threads", lambda: 3)
    monkeypatch.setattr(native, "refine", noted)
    scores, images = np.full((1, 2, 8, 8), 0.5, np.float32), np.zeros((1, 8, 8, 3), np.uint8)
    if native.load()[0] is not None:
        Refiner(DEFAULT)(scores, images)
        Refiner(DEFAULT, 2)(scores, images)
        assert asked == [3, 2]


def test_a_runtime_chooses_by_itself_where_the_whole_machine_is_its_own(color_onnx, monkeypatch):
    ort = pytest.importorskip("wsss_deploy.backends.onnxruntime_backend")
    monkeypatch.setattr(environment, "cpu_threads", lambda: os.cpu_count())
    assert environment.thread_limit() is None
    segmenter = Segmenter(color_onnx, device="cpu")
    assert segmenter.runtime._session.get_session_options().intra_op_num_threads == 0
    assert segmenter.describe()["threads"] == "its default"
    monkeypatch.setattr(environment, "cpu_threads", lambda: os.cpu_count() - 1)
    assert ort.thread_limit() == os.cpu_count() - 1
