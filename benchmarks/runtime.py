"""The runtime over a long time, in threads, at its start and without torch.

    python -m benchmarks.runtime MODEL [--count 10000] [--json FILE] [--check]

Memory: COUNT predictions of mixed sizes, resident memory after the first 500 and at the end. Threads: the same images
through one and through eight threads. Start: `import wsss_deploy`, and the way to the first mask. Overhead: what
`predict` takes beyond the bare runtime call, with torch installed and with its import blocked.

--check: memory grows by at most 4 MB or 2 % after the first 500; eight threads give the same masks; the import takes
less than 0.2 s, the first mask less than 1.5 s; the overhead is at most 10 %, the refinement at most 15 % on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from wsss_deploy import Segmenter
from wsss_deploy.bench.measure import Case
from wsss_deploy.card import Sizing
from wsss_deploy.environment import describe_environment

SETTLED = 500
SIZES = tuple((32 + 16 * (i % 4), 32 + 16 * (i // 4)) for i in range(16))


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def images(count: int) -> list[np.ndarray]:
    """Noise of the mixed sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8) for i in range(count)]


def memory(model: str, count: int) -> dict[str, float]:
    """Resident memory after the first predictions and after all."""
    segmenter = Segmenter(model, device="cpu", threads=1, sizing=Sizing())
    given = images(64)
    settled = 0.0
    for index in range(count):
        segmenter.predict(given[index % len(given)])
        if index + 1 == min(SETTLED, count):
            settled = resident_mb()
    return {"predictions": count, "after_first_mb": settled, "at_end_mb": resident_mb()}


def threads(model: str) -> dict[str, int]:
    """Masks of eight threads that differ from those of one."""
    segmenter = Segmenter(model, device="cpu", threads=1, sizing=Sizing())
    given = images(200)
    alone = [segmenter.predict(image).mask for image in given]
    with ThreadPoolExecutor(8) as pool:
        together = [result.mask for result in pool.map(segmenter.predict, given)]
    differing = sum(not np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    return {"images": len(given), "threads": 8, "differing_masks": differing}


def start() -> float:
    """Seconds of `import wsss_deploy`, the least of five new processes."""
    code = "import time; t = time.perf_counter(); import wsss_deploy; print(time.perf_counter() - t)"
    line = [sys.executable, "-c", code]
    return min(float(subprocess.run(line, capture_output=True, text=True, check=True).stdout) for _ in range(5))


def measured(model: str, size: int, runs: int, refine: bool, torch: bool) -> dict[str, float]:
    """Figures of `wsss_deploy.bench` in a new process, with or without torch."""
    case = Case(model=model, device="cpu", size=size, runs=runs, threads=1, refine=refine)
    blocked = "" if torch else "sys.modules['torch'] = None; "
    code = f"import sys, json; {blocked}from wsss_deploy.bench.measure import *; "
    code += "print(json.dumps(measure(Case.model_validate_json(sys.argv[1]))))"
    line = [sys.executable, "-c", code, case.model_dump_json()]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def problems(report: dict) -> list[str]:
    """What misses its goal."""
    found = []
    before, after = report["memory"]["after_first_mb"], report["memory"]["at_end_mb"]
    if after - before > max(4, 0.02 * before):
        found.append(f"memory grew from {before:.1f} to {after:.1f} MB")
    if report["threads"]["differing_masks"]:
        found.append(f"{report['threads']['differing_masks']} masks of eight threads differ")
    if report["import_s"] >= 0.2:
        found.append(f"import takes {report['import_s']:.2f} s")
    for name in ("with_torch", "without_torch"):
        row = report[name]
        if row["overhead"] > 0.1:
            found.append(f"{name}: predict takes {row['overhead']:.1%} more than the runtime's call")
        if row["refinement"] > 0.15:
            found.append(f"{name}: the refinement takes {row['refinement']:.1%} more")
        if row["first_mask_ms"] >= 1500:
            found.append(f"{name}: the first mask takes {row['first_mask_ms']:.0f} ms")
    return found


def main() -> int:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.onnx")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    report: dict = {
        "environment": describe_environment(),
        "model": Path(arguments.model).name,
        "import_s": start(),
        "memory": memory(arguments.model, arguments.count),
        "threads": threads(arguments.model),
    }
    for name, torch in (("with_torch", True), ("without_torch", False)):
        report[name] = measured(arguments.model, arguments.size, arguments.runs, True, torch)
    report["seconds"] = time.perf_counter() - begin
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"import {report['import_s'] * 1e3:.0f} ms; memory {report['memory']}; threads {report['threads']}")
    for name in ("with_torch", "without_torch"):
        row = report[name]
        print(
            f"{name}: p50 {row['p50_ms']:.1f} ms, bare {row['bare_ms']:.1f} ms, overhead {row['overhead']:+.1%}, "
            f"refinement {row['refinement']:+.1%}, first mask {row['first_mask_ms']:.0f} ms"
        )
    missed = problems(report)
    for problem in missed:
        print(f"MISSED {problem}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
