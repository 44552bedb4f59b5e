"""Standard error of the whole process without some lines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from wsss_deploy.native_stderr import without_lines

PROGRAM = """
import os, sys
from wsss_deploy.native_stderr import without_lines
with without_lines(b"noise"):
    os.write(2, b"native noise\\nnative news\\n")
    print("from Python, terminal:", sys.stderr.isatty(), file=sys.stderr)
    os.system("echo of a child >&2; echo noise of a child >&2")
print("after", file=sys.stderr)
os.write(2, b"noise after\\n")
"""


def test_only_these_lines_are_kept_away():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    expected = ["from Python, terminal: False", "native news", "of a child", "after", "noise after"]
    assert sorted(done.stderr.splitlines()) == sorted(expected)
    assert done.stderr.splitlines()[-2:] == ["after", "noise after"]


def test_progress_keeps_its_terminal():
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    assert b"from Python, terminal: True" in os.read(ours, 10_000)
    for end in (ours, theirs):
        os.close(end)


def test_without_standard_error():
    code = "import os; from wsss_deploy.native_stderr import without_lines\nos.close(2)\nwith without_lines(b'x'): pass"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_passes_and_blocks_may_overlap(capfd):
    threads = len(threading.enumerate())

    def failing():
        with without_lines(b"noise"), without_lines(b"news"):
            os.write(2, b"noise\nnews\n")
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert capfd.readouterr().err == "news\n"
    assert len(threading.enumerate()) == threads
    os.write(2, b"noise\n")
    assert capfd.readouterr().err == "noise\n"
