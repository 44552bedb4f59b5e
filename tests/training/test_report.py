"""What a run says while it goes on."""

from __future__ import annotations

import logging

import pytest

from training.report import RunReport


@pytest.mark.parametrize(("seconds", "lines"), [(0.001, 10), (4.0, 20)])
def test_slow_runs_say_more_than_a_line_a_tenth(tmp_path, caplog, monkeypatch, seconds, lines):
    """200 steps have ten tenths; at 4 s a step, every tenth step's row is 40 s after the last."""
    clock = [0.0]
    monkeypatch.setattr("training.report.time.perf_counter", lambda: clock[0])
    with caplog.at_level(logging.INFO), RunReport(tmp_path, 200) as report:
        for iteration in range(200):
            clock[0] += seconds
            report.step(iteration, {"ce": 1.0}, 1e-3, 8)
    told = [record.getMessage() for record in caplog.records if "ETA" in record.getMessage()]
    assert len(told) == lines
    assert told[-1].startswith("200/200")
