"""The model that the page makes by itself, with a command that takes no time."""

from __future__ import annotations

import time

import pytest

from demo.registry import Models
from demo.starter import Starter
from wsss_deploy.errors import WsssError

MAKE = """
import pathlib, shutil, sys
out = pathlib.Path(sys.argv[2]); out.mkdir()
run = out / ".unfinished" / "run"; run.mkdir(parents=True)
(run / "log.csv").write_text("iteration,name,value\\n40,total,0.5\\n")
print("2/4 training", flush=True)
while not pathlib.Path(sys.argv[1] + ".go").exists(): __import__("time").sleep(0.05)
shutil.rmtree(out / ".unfinished"); shutil.copy(sys.argv[1], out / "model.onnx")
"""


def test_it_is_made_once_with_its_progress_and_then_offered(tmp_path, tiny_onnx):
    cache = tmp_path / "cache"
    source = tmp_path / "model.onnx"
    source.write_bytes(tiny_onnx.read_bytes())
    starter = Starter(cache, ("-c", MAKE, str(source)))
    models = Models(later=starter.model)
    starter.start()
    for _ in range(400):
        if starter.status().iteration:
            break
        time.sleep(0.05)
    assert (starter.status().state, starter.status().iteration, starter.status().note) == ("making", 40, "2/4 training")
    assert models.keys() == []
    with pytest.raises(WsssError, match="no model yet"):
        models.open(None)
    (tmp_path / "model.onnx.go").touch()
    assert starter.wait().state == "ready"
    assert models.keys() == ["starter/model.onnx"]
    assert models.open("starter/model.onnx").card.name == "tiny"
    assert [path.name for path in cache.iterdir()] == ["starter"]  # nothing unfinished is left
    again = Starter(cache, ("-c", "raise SystemExit(1)"))
    again.start()
    assert again.status().state == "ready"


def test_a_failure_and_a_stop_leave_nothing(tmp_path):
    failing = Starter(tmp_path, ("-c", "raise SystemExit('no space left')"))
    failing.start()
    assert (failing.wait().state, failing.status().note) == ("failed", "no space left")
    endless = Starter(tmp_path, ("-c", "import time; time.sleep(600)"))
    endless.start()
    endless.close()
    assert endless.status().state == "failed"
    assert list(tmp_path.iterdir()) == []
