from __future__ import annotations

import subprocess
import sys
import time

import pytest

import wsss_deploy


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_loads_no_runtime():
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport wsss_deploy\nprint(time.perf_counter() - start)\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'timm', 'tensorrt', 'PIL', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.2


def test_the_public_names_load_no_runtime():
    code = (
        "import sys, wsss_deploy\nfor name in wsss_deploy.__all__:\n    getattr(wsss_deploy, name)\n"
        "import wsss_deploy.cli.predict, wsss_deploy.cli.doctor, wsss_deploy.backends\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'timm', 'tensorrt'} & set(sys.modules)\nassert not heavy, heavy"
    )
    start = time.perf_counter()
    run(code)
    assert time.perf_counter() - start < 10


def test_public_api():
    assert set(wsss_deploy.__all__) <= set(dir(wsss_deploy))
    assert wsss_deploy.Segmenter.__module__ == "wsss_deploy.segmenter"
    assert wsss_deploy.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Segmentr'"):
        _ = wsss_deploy.Segmentr
