"""CPU seconds and peak memory of the Gated CRF energy, value and gradient, and what it adds to a training step.

    python -m benchmarks.energy [--json FILE] [--check] [--sizes 128 512] [--no-step]

Every figure comes from a process of its own. Forms: a plain unfold form, which materialises (N, C, window, H W), the
streamed torch reference, and the compiled one. One image, 21 classes, radius 5, one kernel over position and colour,
an all-ones source mask, float32; forward and backward to the probabilities. CPU seconds are the process's (user and
system, all threads); unfold runs once at 512 x 512, everything else `--repeats` times, the least counts. Memory is the
peak beyond what was resident before, less the gradient.

The training step is the default ViT-Tiny's at 256 px, batch 8, through `training.methods`: forward, backward, clipping
and AdamW. Steps with and without the loss take turns, the least of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

RADIUS, SIGMA_XY, SIGMA_RGB, CLASSES = 5, 6.0, 0.1, 21
UNFOLD, TORCH, OURS, OURS_2 = "unfold, torch", "streamed, torch", "compiled, 1 thread", "compiled, 2 threads"
FORMS = (UNFOLD, TORCH, OURS, OURS_2)
STRIDES = (4, 1)
# CPU seconds of unfold over ours; MB beyond inputs and gradient at 512 x 512; part of a training step at stride 4.
GOAL_RATIO, AIM_RATIO, GOAL_MEMORY, GOAL_STEP = 100.0, 300.0, 60.0, 0.05
# Largest relative difference between the forms' values and gradients (float32).
SAME = 1e-4


def unfold_loss(probabilities, image, mask):
    """The loss the plain way: all neighbours of all pixels at once."""
    import torch
    from torch.nn import functional as F

    n, _, height, width = probabilities.shape
    side = 2 * RADIUS + 1
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.stack([xs, ys]).to(image).expand(n, 2, height, width)
    features = torch.cat([position / SIGMA_XY, image / SIGMA_RGB], dim=1)

    def neighbours(maps):
        return F.unfold(maps, side, padding=RADIUS).view(n, maps.shape[1], side**2, height * width)

    difference = neighbours(features) - features.flatten(2).unsqueeze(2)
    kernel = torch.exp(-difference.square().sum(1) / 2)
    kernel[:, side**2 // 2] = 0
    agreement = (neighbours(probabilities) * probabilities.flatten(2).unsqueeze(2)).sum(1)
    return (neighbours(mask)[:, 0] * kernel * (1 - agreement)).sum() / mask.sum()


def our_loss(form: str):
    from training.losses import Kernel, gated_crf_loss

    kernel = Kernel(1.0, {"xy": SIGMA_XY, "rgb": SIGMA_RGB})
    name = "torch" if form == TORCH else "cpu"
    return lambda p, image, mask: gated_crf_loss(p, [kernel], {"rgb": image}, RADIUS, mask_src=mask, form=name)


def problem(size: int):
    """Probabilities, an image of smooth patches with a little noise, and a mask."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    probabilities = torch.randn(1, CLASSES, size, size).softmax(1)
    image = F.interpolate(torch.randn(1, 3, size // 8, size // 8), size=(size, size))
    return probabilities, image + 0.05 * torch.randn(1, 3, size, size), torch.ones(1, 1, size, size)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_form(form: str, size: int, repeats: int) -> dict[str, Any]:
    """One form in this process."""
    import torch

    torch.set_num_threads(2 if form == OURS_2 else 1)
    loss_of = unfold_loss if form == UNFOLD else our_loss(form)

    def run(p, image, mask):
        p.grad = None
        loss = loss_of(p, image, mask)
        loss.backward()
        return float(loss.detach())

    # Libraries load before anything is counted.
    small, *others = problem(32)
    run(small.requires_grad_(), *others)
    p, *others = problem(size)
    p.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, seconds, peak = resident("VmRSS"), [], 0
    for repeat in range(repeats):
        started = time.process_time()
        value = run(p, *others)
        seconds.append(time.process_time() - started)
        if repeat == 0:
            peak = resident("VmHWM") - before - p.grad.nbytes
    norm = float(p.grad.double().norm())
    return {"form": form, "size": size, "cpu_s": min(seconds), "peak_mb": peak / 1e6, "value": value, "norm": norm}


def sparse_batch(side: int, device="cpu"):
    """Eight random images of which one pixel in fifty has a label."""
    import torch

    from training.methods import Batch

    labels = torch.where(torch.rand(8, side, side) < 0.02, torch.randint(CLASSES, (8, side, side)), 255)
    valid = torch.ones(8, side, side, dtype=torch.bool)
    unknown, labelled = torch.full((8, CLASSES), torch.nan), torch.ones(8, CLASSES, dtype=torch.bool)
    parts = (torch.randn(8, 3, side, side), labels, valid, unknown, labelled)
    return Batch(*(part.to(device) for part in parts))


def measure_step(strides: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """CPU seconds of training steps without the loss and with it at each stride, in turn."""
    import torch

    from training.methods import build_method
    from training.methods.settings import GatedCRFSettings, PartialCESettings
    from training.optimiser import build_optimizer
    from training.recipe import Optimisation, build_recipe
    from training.trainer import make_fabric, use_plain_attention
    from wsss_deploy.card import Architecture
    from wsss_deploy.networks import build_network, encoder_preprocessing

    torch.manual_seed(0)
    torch.set_num_threads(1)
    architecture = Architecture(encoder="vit_tiny_patch16_224", decoder="mlp", decoder_width=256)
    network = build_network(architecture, CLASSES).train()
    use_plain_attention(network.encoder)
    preprocessing = encoder_preprocessing(architecture.encoder, architecture.encoder_options)
    settings = {"without": PartialCESettings()}
    settings |= {f"stride {stride}": GatedCRFSettings(stride=stride, start=0.0) for stride in strides}
    methods = {name: build_method(chosen, CLASSES, preprocessing) for name, chosen in settings.items()}
    optimizer = build_optimizer(network.encoder, [network.decoder], Optimisation())
    fabric = make_fabric(build_recipe({"device": "cpu", "method": {"name": "gated_crf"}}))
    batch = sparse_batch(256)

    def step(method):
        started = time.process_time()
        with fabric.autocast():
            losses = method(network, batch, 0.5)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return time.process_time() - started

    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            seconds = step(method)
            if repeat:
                times[name].append(seconds)
    least = {name: min(values) for name, values in times.items()}
    return {
        "cpu_s": least,
        "added": {name: value / least["without"] - 1 for name, value in least.items() if name != "without"},
        "precision": fabric.strategy.precision.precision,
    }


def in_process(*arguments: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.energy", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ratio(rows: list[dict[str, Any]], size: int, form: str = OURS) -> float:
    unfold, other = (next(r for r in rows if r["size"] == size and r["form"] == name) for name in (UNFOLD, form))
    return unfold["cpu_s"] / other["cpu_s"]


def missed(report: dict[str, Any]) -> list[str]:
    """What misses its goal."""
    rows, lines = report["rows"], []
    for row in rows:
        baseline = next(r for r in rows if r["size"] == row["size"] and r["form"] == UNFOLD)
        for key in ("value", "norm"):
            if abs(row[key] - baseline[key]) > SAME * abs(baseline[key]):
                lines.append(f"{key} at {row['size']}: {row['form']} {row[key]}, unfold {baseline[key]}")
        if row["form"] == OURS and ratio(rows, row["size"]) < GOAL_RATIO:
            lines.append(f"unfold / compiled at {row['size']}: {ratio(rows, row['size']):.0f}, goal {GOAL_RATIO:.0f}")
        if row["form"] == OURS and row["size"] <= 512 and row["peak_mb"] > GOAL_MEMORY:
            lines.append(f"memory at {row['size']}: {row['peak_mb']:.0f} MB, goal {GOAL_MEMORY:.0f}")
    if report["step"] and report["step"]["added"]["stride 4"] > GOAL_STEP:
        lines.append(f"training step at stride 4: {report['step']['added']['stride 4']:+.1%}, goal +{GOAL_STEP:.0%}")
    return lines


def show(report: dict[str, Any]) -> None:
    """The report as Markdown."""
    print("| map | form | CPU ms | peak MB beyond inputs and gradient | unfold / this |\n|---|---|---|---|---|")
    for row in report["rows"]:
        times = f"{ratio(report['rows'], row['size'], row['form']):.0f}"
        size = f"{row['size']}x{row['size']}"
        print(f"| {size} | {row['form']} | {1e3 * row['cpu_s']:.1f} | {row['peak_mb']:.0f} | {times} |")
    if report["step"]:
        print("\n| training step, ViT-Tiny, batch 8, 256 px | CPU s | added |\n|---|---|---|")
        for name, seconds in report["step"]["cpu_s"].items():
            added = report["step"]["added"].get(name)
            print(f"| {name} | {seconds:.3f} | {'' if added is None else f'{added:+.1%}'} |")
        print(f"\nStep in {report['step']['precision']}.", end=" ")
    where = f"load {report['load']:.1f} on {os.cpu_count()} CPUs, {platform.machine()}, {report['date']}"
    print(f"\n{report['kernels']}; {where}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[128, 512], help="sides of the prediction map")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-step", action="store_true", help="leave out the training step")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, *numbers = options.measure
        measured = measure_step(STRIDES, int(numbers[0])) if what == "step" else measure_form(what, *map(int, numbers))
        print(json.dumps(measured))
        return 0
    from wsss_deploy.pairwise import native

    rows = []
    for size in options.sizes:
        for form in FORMS:
            repeats = 1 if form == UNFOLD and size > 256 else options.repeats
            rows.append(in_process("--measure", form, str(size), str(repeats)))
    step = None if options.no_step else in_process("--measure", "step", str(options.repeats))
    report = {"kernels": native.load()[1], "load": os.getloadavg()[0], "date": str(date.today())}
    report |= {"rows": rows, "step": step}
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = missed(report) if options.check else []
    for line in lines:
        print(f"MISSED: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
