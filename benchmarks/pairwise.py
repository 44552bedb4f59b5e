"""CPU seconds and peak memory of the pairwise refinement: baseline, ours, the exported functions.

    python -m benchmarks.pairwise [--json] [--check] [--scaling]

Every figure comes from a process of its own. The configuration is 512 x 512, 21 classes, 48 neighbours, 10
iterations, affinity included, float32. The baseline is the usual unfold form, which materialises
(N, C, K, H, W). CPU seconds are the process's (user and system, all threads) around the call; the baseline runs
once, the others `--repeats` times, the least counts. Memory is the peak beyond what was resident, less the output.
The goals are of the compiled form with weights and masks stored in 16 bits, which has to agree with the full one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wsss_deploy.pairwise import PairwiseParameters, native, refine

PARAMETERS = PairwiseParameters()
MEGABYTE = 1e6
GOAL_RATIO, AIM_RATIO, GOAL_MEMORY = 200.0, 400.0, 110.0
# At least this for the form without 16 bits, which is `refine`'s default.
FULL_RATIO = 150.0
SIZE = (512, 512, 21, PARAMETERS.iterations)
SCALING = [(n, n, 21, 10) for n in (512, 1024, 2048, 4096)]
SCALING += [(512, 512, classes, 10) for classes in (42, 84)] + [(512, 512, 21, steps) for steps in (20, 40)]

Runner = Callable[[], Any]


def problem(height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A random image of 16-pixel patches with some noise, and random probabilities."""
    rng = np.random.default_rng(0)
    coarse = rng.random((1, 3, height // 16 + 1, width // 16 + 1), dtype=np.float32)
    guide = coarse.repeat(16, 2).repeat(16, 3)[:, :, :height, :width] * np.float32(0.9)
    guide += np.float32(0.1) * rng.random(guide.shape, dtype=np.float32)
    masks = rng.random((1, classes, height, width), dtype=np.float32)
    masks /= masks.sum(1, keepdims=True)
    return masks, np.ascontiguousarray(guide)


def unfold_refine(masks, guide, parameters: PairwiseParameters):
    """Refined masks of tensors on any device, the plain way: (N, C, K, H, W) is there as a whole."""
    import torch
    from torch.nn import functional as F

    def neighbours(values):
        batch, channels, height, width = values.shape
        parts = []
        for d in parameters.dilations:
            padded = F.pad(values, (d,) * 4, mode="replicate")
            nine = F.unfold(padded, 3, dilation=d).view(batch, channels, 9, height, width)
            parts.append(nine[:, :, [0, 1, 2, 3, 5, 6, 7, 8]])
        return torch.cat(parts, 2)

    around = neighbours(guide)
    ratio = (around - guide[:, :, None]) / (around.std(2, keepdim=True) + 1e-8) / parameters.contrast
    weights = (-(ratio**2)).mean(1).softmax(1)
    position = torch.tensor(parameters.position_weights(), device=masks.device)
    weights = weights + parameters.second * position[None, :, None, None]
    for _ in range(parameters.iterations):
        masks = (neighbours(masks) * weights[:, None]).sum(2)
    return masks


def unfold_form(masks: np.ndarray, guide: np.ndarray, parameters: PairwiseParameters) -> Runner:
    import torch

    torch.set_num_threads(1)
    return lambda: unfold_refine(torch.from_numpy(masks), torch.from_numpy(guide), parameters).numpy()


def compiled_form(threads: int, storage: Literal["full", "compact"] = "full") -> Callable[..., Runner]:
    def make(masks, guide, parameters):
        return lambda: refine(masks, guide, parameters, form="cpu", threads=threads, storage=storage)

    return make


def torch_form(masks: np.ndarray, guide: np.ndarray, parameters: PairwiseParameters) -> Runner:
    import torch

    torch.set_num_threads(1)
    tensors = torch.from_numpy(masks), torch.from_numpy(guide)
    return lambda: refine(*tensors, parameters, form="torch").numpy()


def functions_form(masks: np.ndarray, guide: np.ndarray, parameters: PairwiseParameters) -> Runner:
    import onnxruntime
    from onnx import TensorProto, helper

    from export.onnx_functions import attach_functions

    shared = {"domain": "wsss", "parameters": parameters.to_json()}
    nodes = [helper.make_node("PairwiseAffinity", ["guide"], ["weights"], **shared)]
    for step in range(parameters.iterations):
        nodes.append(helper.make_node("PairwiseStep", [f"m{step}", "weights"], [f"m{step + 1}"], **shared))
    names = ("guide", "m0", f"m{parameters.iterations}")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None, "H", "W"]) for name in names]
    graph = helper.make_graph(nodes, "refine", values[:2], values[2:])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("wsss", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    attach_functions(model, parameters)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"guide": guide, "m0": masks})[0]


BASELINE, FULL, OURS = "unfold baseline, torch", "compiled, 1 thread", "compiled, 16-bit storage, 1 thread"
FORMS: dict[str, Callable[..., Runner]] = {
    BASELINE: unfold_form,
    "reference, torch": torch_form,
    "ONNX functions, ONNX Runtime": functions_form,
    FULL: compiled_form(1),
    "compiled, 2 threads": compiled_form(2),
    OURS: compiled_form(1, "compact"),
    "compiled, 16-bit storage, 2 threads": compiled_form(2, "compact"),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(form: str, height: int, width: int, classes: int, iterations: int, repeats: int) -> dict[str, float]:
    """Time and memory of one form in this process."""
    parameters = PARAMETERS.model_copy(update={"iterations": iterations})
    masks, guide = problem(height, width, classes)
    # Libraries load before anything is counted.
    FORMS[form](*problem(32, 32, classes), parameters)()
    run = FORMS[form](masks, guide, parameters)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, peak = resident("VmRSS"), 0.0
    best_cpu, best_wall = float("inf"), float("inf")
    for repeat in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        out = run()
        best_cpu = min(best_cpu, time.process_time() - cpu)
        best_wall = min(best_wall, time.perf_counter() - wall)
        if repeat == 0:
            peak = (resident("VmHWM") - before - out.nbytes) / MEGABYTE
    check = float(np.abs(out[:, :, ::37, ::41].astype(np.float64)).sum())
    return {"cpu_s": best_cpu, "wall_s": best_wall, "peak_mb": peak, "check": check}


def in_process(form: str, *sizes: int) -> dict[str, float]:
    """`measure` in a fresh process."""
    arguments = [sys.executable, "-m", "benchmarks.pairwise", "--measure", form, *map(str, sizes)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{form}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def agreement() -> tuple[float, float]:
    """`storage_difference` of smooth confident probabilities: between classes of pure noise every rounding decides."""
    height, width, classes, _ = SIZE
    masks, guide = problem(height, width, classes)
    scores = np.random.default_rng(1).normal(size=(1, classes, height // 16, width // 16)).astype(np.float32)
    powers = np.exp(3 * scores.repeat(16, 2).repeat(16, 3) + masks)
    masks = powers / powers.sum(1, keepdims=True)
    return storage_difference(masks, guide, PARAMETERS)


def storage_difference(masks: np.ndarray, guide: np.ndarray, parameters: PairwiseParameters) -> tuple[float, float]:
    """The largest difference that 16-bit storage makes, and the part of pixels of one winning class."""
    full, small = (refine(masks, guide, parameters, form="cpu", storage=kind) for kind in ("full", "compact"))
    return float(np.abs(full - small).max()), float((full.argmax(1) == small.argmax(1)).mean())


def photos(model: str, data: str, count: int = 15) -> None:
    """The same of a model's scores on images of the split val, for both of the runtime's refinements."""
    from PIL import Image

    from training.data.dataset import open_dataset
    from wsss_deploy import Segmenter
    from wsss_deploy.pairwise.guides import make_guide
    from wsss_deploy.refinement import DEFAULT, STRONG

    source, segmenter = open_dataset(data), Segmenter(model, device="cpu", refine=False)
    for settings in (DEFAULT, STRONG):
        found = []
        for name in source.splits["val"][:count]:
            image = source.load_image(name)
            scores = segmenter.predict(image).network_scores[None]
            size = (scores.shape[3], scores.shape[2])
            seen = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            found.append(storage_difference(scores, make_guide(seen[None], settings.guide), settings.parameters))
        differences, same = zip(*found, strict=True)
        print(f"{settings}: at most {max(differences):.1e}, same class in {100 * np.mean(same):.4f} % of pixels")


def streamed() -> dict[str, float]:
    """All steps' float32 traffic at the copy bandwidth of this machine, measured now.

    A scale and no bound: several steps in one pass and 16 bits move less.
    """
    height, width, classes, steps = SIZE
    source = np.ones(32 * 2**20, np.float32)
    target = np.ones_like(source)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        target[:] = source
        best = min(best, time.process_time() - start)
    traffic = steps * 4 * height * width * (2 * classes + len(PARAMETERS.offsets))
    return {"cpu_s": traffic * best / (2 * source.nbytes), "copy_gb_s": 2 * source.nbytes / best / 1e9}


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    print(f"{report['kernels']}; load average {report['load']:.1f} on {os.cpu_count()} CPUs")
    print(f"{'512x512, 21 classes, 48 neighbours, 10 steps':46}CPU s   wall s  peak MB  baseline/this")
    baseline = report["rows"][BASELINE]["cpu_s"]
    for name, row in report["rows"].items():
        wall, peak = (f"{row[key]:8.2f}" if key in row else " " * 8 for key in ("wall_s", "peak_mb"))
        print(f"{name:44}{row['cpu_s']:7.3f} {wall} {peak}  {baseline / row['cpu_s']:13.0f}")
    for (height, width, classes, steps), row in zip(SCALING, report["scaling"], strict=False):
        each = row["cpu_s"] / (height * width * classes * steps) * 1e9
        name = f"{height}x{width}, {classes} classes, {steps} steps"
        print(
            f"{name:44}{row['cpu_s']:7.3f} {row['wall_s']:8.2f} {row['peak_mb']:8.2f}  {each:.2f} ns a value and step"
        )
    print(
        f"16-bit storage against full: masks differ by at most {report['difference']:.1e} (allowed 1e-3), the largest "
        f"is the same class in {100 * report['same_class']:.3f} % of pixels (at least 99.9)"
    )
    print(
        f"baseline/ours {report['ratio']:.0f} (at least {GOAL_RATIO:.0f}, aim {AIM_RATIO:.0f}), without 16 bits "
        f"{report['full_ratio']:.0f} (at least {FULL_RATIO:.0f}); memory {report['peak_mb']:.0f} MB (at most "
        f"{GOAL_MEMORY:.0f}): {'met' if report['passed'] else 'MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a goal is missed")
    parser.add_argument("--scaling", action="store_true", help="also other sizes, classes and steps (minutes)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--photos", nargs=2, metavar=("MODEL", "DATA"), help="only what 16 bits change on images")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        form, *numbers = arguments.measure
        json.dump(measure(form, *map(int, numbers)), sys.stdout)
        return
    if arguments.photos:
        photos(*arguments.photos)
        return
    rows = {form: in_process(form, *SIZE, 1 if form == BASELINE else arguments.repeats) for form in FORMS}
    ours, baseline = rows[OURS], rows[BASELINE]
    rows["float32 traffic of all steps, streamed"] = streamed()
    ratio = baseline["cpu_s"] / ours["cpu_s"]
    off = {name: abs(rows[name]["check"] / baseline["check"] - 1) for name in (FULL, OURS)}
    difference, same = agreement()
    agree = off[FULL] < 1e-5 and off[OURS] < 1e-4 and difference < 1e-3 and same > 0.999
    report = {
        "kernels": native.load()[1],
        "load": os.getloadavg()[0],
        "rows": rows,
        "scaling": [in_process(OURS, *sizes, 4) for sizes in SCALING] if arguments.scaling else [],
        "ratio": ratio,
        "full_ratio": baseline["cpu_s"] / rows[FULL]["cpu_s"],
        "peak_mb": ours["peak_mb"],
        "difference": difference,
        "same_class": same,
        "passed": agree
        and ratio >= GOAL_RATIO
        and baseline["cpu_s"] / rows[FULL]["cpu_s"] >= FULL_RATIO
        and max(ours["peak_mb"], rows[FULL]["peak_mb"]) <= GOAL_MEMORY,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    if arguments.check and not report["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
