"""`wsss-demo` as a process, and what its server refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

RUN = [sys.executable, "-c", "from demo.cli import main; main()"]


def run(*arguments: str, cwd: Path, script: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script] if script else RUN
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def test_errors_are_short_and_say_what_to_do(tmp_path, tiny_model):
    done = run(str(tmp_path), "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"wsss-demo: {tmp_path}: holds no model; expected *.")
    done = run(str(tiny_model), "--auth", "ada", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "wsss-demo: --auth: expected USER:PASSWORD, both not empty\n")
    done = run(str(tiny_model), "--port", "70000", cwd=tmp_path)
    assert done.returncode == 2
    assert "'70000' is no port" in done.stderr
    absent = "import sys; sys.modules['gradio'] = None; from demo.cli import main; main()"
    done = run(str(tiny_model), "--port", "0", cwd=tmp_path, script=absent)
    assert done.returncode == 1
    assert "pip install 'wsss-deploy[demo]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.browser
def test_the_command_serves_an_exported_model(tiny_onnx, tmp_path, visit, half_and_half):
    pytest.importorskip("gradio")
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "GRADIO_SHARE": "True"}
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [*RUN, str(tiny_onnx), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert "onnxruntime" in first, process.stderr.read()
        found = re.search(r"http://127\.0\.0\.1:\d+", second)
        visitor = visit(found[0])
        visitor.upload(half_and_half)
        visitor.wait_for_result()
        assert visitor.natural_size("#overlay img") == (200, 120)
        timing = visitor.page.locator("#timing").inner_text()
        assert "ONNX Runtime" in timing
        assert "CPUExecutionProvider" in timing
        assert list((tmp_path / "temporary").iterdir())
    finally:
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped" in output
    assert errors == "", errors
    assert list((tmp_path / "temporary").iterdir()) == []  # uploads and results are gone


def fetch(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_refuses_what_it_should(address, tmp_path):
    # Another name that points here, as in DNS rebinding.
    assert fetch(address)[0] == 200
    assert fetch(address, {"Host": "evil.example"})[0] == 400
    # Pages that the demo does not offer.
    for path in ("docs", "openapi.json", "monitoring/summary", "gradio_api/mcp/sse"):
        assert fetch(f"{address}/{path}")[0] in (403, 404, 405), path
    # A file of the server in place of an upload.
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    assert fetch(f"{address}/gradio_api/file={secret}")[0] in (403, 404)
    events = json.loads(fetch(f"{address}/config")[1])["dependencies"]
    event = next(event for event in events if event["targets"][0][1] == "change")
    for path in (str(secret), "/etc/passwd", "http://192.0.2.1/image.png"):
        named = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for data in ([named, 0.5, None], [None, named, None], [[{"deep": named}], 0.5, named]):
            body = json.dumps({"fn_index": event["id"], "session_hash": "by-hand", "data": data})
            fetch(f"{address}/gradio_api/queue/join", {"Content-Type": "application/json"}, body.encode())
            answer = fetch(f"{address}/gradio_api/queue/data?session_hash=by-hand")[1]
            assert "found no uploaded file" in answer
            assert '"success":false' in answer


def test_mounts_into_an_application(color_segmenter):
    gr = pytest.importorskip("gradio")
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    import demo

    app = fastapi.FastAPI()

    @app.get("/")
    def own() -> str:
        return "own"

    gr.mount_gradio_app(app, demo.build_app(color_segmenter), path="/segment")
    with TestClient(app) as client:
        assert client.get("/").json() == "own"
        assert "gradio" in client.get("/segment/").text
        config = client.get("/segment/config").json()
        assert config["analytics_enabled"] is False
