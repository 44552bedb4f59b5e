"""Fifty people upload at once: served in order, none lost, memory bounded, the page responsive meanwhile."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'wsss-deploy[demo]'")

PEOPLE = 50
WIDTH, HEIGHT = 640, 400


def request(url: str, data: bytes | None = None, kind: str = "application/json"):
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind}), timeout=240)


def upload(address: str, content: bytes, name: str) -> str:
    lines = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    body = lines.encode() + content + b"\r\n--x--\r\n"
    with request(f"{address}/gradio_api/upload", body, "multipart/form-data; boundary=x") as answer:
        return json.load(answer)[0]


def resident_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_fifty_uploads_at_once(address, stripes):
    red, blue = (250, 10, 10), (10, 10, 250)
    contents = [
        # Two to four stripes by the person's number, so that an exchange of results is seen.
        stripes(f"{index}.png", WIDTH, HEIGHT, *[red, blue, blue, red][: 2 + index % 3]).read_bytes()
        for index in range(PEOPLE)
    ]
    config = json.load(request(f"{address}/config"))
    event = next(event for event in config["dependencies"] if event["targets"][0][1] == "change")["id"]
    model = next(part["props"]["value"] for part in config["components"] if part["props"].get("elem_id") == "model")
    order: list[int] = []
    lock = threading.Lock()
    slowest = 0.0
    before = resident_megabytes()

    def join(index: int, path: str) -> None:
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"fn_index": event, "session_hash": f"load{index}", "data": [image, 0.5, model]})
        request(f"{address}/gradio_api/queue/join", body.encode()).close()

    def wait(index: int) -> dict:
        with request(f"{address}/gradio_api/queue/data?session_hash=load{index}") as stream:
            for line in stream:
                message = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if message.get("msg") == "process_completed":
                    with lock:
                        order.append(index)
                    return message
        raise AssertionError(f"{index}: the stream ended without a result")

    with ThreadPoolExecutor(PEOPLE) as people:
        paths = list(people.map(lambda index: upload(address, contents[index], f"{index}.png"), range(PEOPLE)))
        for index, path in enumerate(paths):
            join(index, path)
        waiting = [people.submit(wait, index) for index in range(PEOPLE)]
        while not all(future.done() for future in waiting):
            start = time.monotonic()
            request(address).close()
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.1)
    answers = [future.result() for future in waiting]
    assert all(answer["success"] for answer in answers)
    for index, answer in enumerate(answers):
        legend = next(part for part in answer["output"]["data"] if isinstance(part, str) and "<th" in part)
        share = {2: "50.0 %", 3: "33.3 %", 4: "50.0 %"}[2 + index % 3]
        assert share in legend
        files = json.dumps(answer["output"]["data"])
        assert f"/{index}_mask.png" in files
    grown = resident_megabytes() - before
    # Streams are read by threads: who is told a moment later than his neighbour is not served out of order.
    assert max(abs(place - index) for place, index in enumerate(order)) <= 4, order
    assert grown < 400, f"{grown:.0f} MB more than before"
    assert slowest < 10, f"the page took {slowest:.1f} s meanwhile"
    print(f"grown {grown:.0f} MB, slowest page {slowest:.2f} s")
