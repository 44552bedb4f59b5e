"""One model at one size on one device, measured in a process of its own so that its memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from wsss_deploy.environment import thread_limit
from wsss_deploy.errors import BackendError


class Case(BaseModel):
    """What is to be measured.

    Attributes:
        model: Path of the model file.
        device: As in `Segmenter`.
        size: Pixels a side of the square image, and longer side at which the network is to see images.
        batch: Images a call for the throughput.
        runs: Timed calls.
        threads: CPU threads; None as in `Segmenter`.
        refine: As in `Segmenter`.
        data: Folder with masks for the mIoU; None measures none.
        split: Its split.
        images: How many of its images; None takes all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    device: str = "auto"
    size: int = 512
    batch: int = 1
    runs: int = 20
    threads: int | None = None
    refine: bool | None = None
    data: str | None = None
    split: str = "val"
    images: int | None = None


def measure_apart(case: Case) -> dict[str, Any]:
    """Measure a case in a new process.

    Args:
        case: What.

    Returns:
        What `measure` gives.

    Raises:
        BackendError: The process failed; the message is its last line.
    """
    line = [sys.executable, "-m", "wsss_deploy.bench.measure", case.model_dump_json()]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and no message"]
        raise BackendError(f"{case.model} on {case.device} at {case.size} px: {told[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(case: Case) -> dict[str, Any]:
    """Latency, throughput, memory, start-up and mIoU of a case, in this process.

    `bare_ms` is the runtime's call alone on a ready array, taken in turn with `predict`; `overhead` is what `predict`
    takes beyond it and beyond the refinement, as a part of it, at the median. `network_px` is the longer side at which
    the network really ran: the nearest multiple of its stride, or the one size of a graph that has only that.

    Args:
        case: What.

    Raises:
        WsssError: The model or the data cannot be used.
    """
    start = time.perf_counter()
    from wsss_deploy import Segmenter
    from wsss_deploy.card import Sizing

    segmenter = Segmenter(
        case.model,
        device=case.device,
        threads=case.threads or thread_limit(),
        refine=case.refine,
        sizing=Sizing(long_side=case.size),
    )
    memory_before = _device_memory(segmenter.runtime.device)
    image = _image(case.size)
    opened = time.perf_counter()
    segmenter.predict(image)
    first = time.perf_counter()
    figures: dict[str, Any] = {
        "network_px": segmenter.card.preprocessing.fixed_size or max(_network_size(segmenter, image)),
        "open_ms": (opened - start) * 1e3,
        "first_mask_ms": (first - start) * 1e3,
        **_latencies(segmenter, image, case.runs),
        "images_per_s": _throughput(segmenter, image, case.batch, case.runs),
    }
    figures["memory_mb"] = _host_memory()
    used = _device_memory(segmenter.runtime.device)
    if used is not None and memory_before is not None:
        figures["device_memory_mb"] = used - memory_before
    if case.data is not None:
        from wsss_deploy.bench.accuracy import find_pairs, mean_iou

        figures["miou"] = mean_iou(segmenter, find_pairs(Path(case.data), case.split, case.images))
    told = {**case.model_dump(), "model": Path(case.model).name, "data": case.data and Path(case.data).name}
    return {**told, **figures, "ran": segmenter.describe()}


def _network_size(segmenter: Any, image: Any) -> tuple[int, int]:
    from wsss_deploy.sizing import seen_size

    return seen_size(image.shape[0], image.shape[1], segmenter.card)


def _latencies(segmenter: Any, image: Any, runs: int) -> dict[str, float]:
    import numpy as np

    high, wide = _network_size(segmenter, image)
    ready = np.ascontiguousarray(image[None, :high, :wide])
    if ready.shape[1:3] != (high, wide):
        ready = _image(max(high, wide))[None, :high, :wide]
    ready = np.ascontiguousarray(ready)
    bare, whole, refinement = [], [], []
    for _ in range(2):  # shapes are planned for and caches filled at the first calls
        segmenter.runtime.run(ready)
    for _ in range(runs):
        start = time.perf_counter()
        segmenter.runtime.run(ready)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        result = segmenter.predict(image)
        whole.append(time.perf_counter() - start)
        refinement.append(result.timing["refinement"] / 1e3)
    middle = float(np.median(bare))
    rest = float(np.median(np.subtract(whole, refinement)))
    return {
        "p50_ms": float(np.median(whole)) * 1e3,
        "p95_ms": float(np.percentile(whole, 95)) * 1e3,
        "bare_ms": middle * 1e3,
        "overhead": rest / middle - 1,
        "refinement": float(np.median(refinement)) / rest,
    }


def _throughput(segmenter: Any, image: Any, batch: int, runs: int) -> float:
    calls = max(1, runs // batch)
    segmenter.predict_batch([image] * batch)
    start = time.perf_counter()
    for _ in range(calls):
        segmenter.predict_batch([image] * batch)
    return calls * batch / (time.perf_counter() - start)


def _image(side: int) -> Any:
    import numpy as np

    rows, columns = np.mgrid[0:side, 0:side]
    noise = np.random.default_rng(0).integers(0, 20, (side, side, 3))
    planes = np.stack([rows * 200 // side, columns * 200 // side, (rows + columns) * 100 // side], axis=2)
    return (planes + noise).astype(np.uint8)


def _host_memory() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _device_memory(device: str) -> float | None:
    """MB in use on the whole GPU: of use only where nothing else runs on it."""
    if not device.startswith("cuda"):
        return None
    from wsss_deploy.environment import query_gpus

    index = int(device.partition(":")[2] or 0)
    used = query_gpus("memory.used")
    return float(used[index]) if index < len(used) else None


if __name__ == "__main__":
    from wsss_deploy.errors import WsssError

    try:
        print(json.dumps(measure(Case.model_validate_json(sys.argv[1]))))
    except WsssError as error:
        sys.exit(str(error))
