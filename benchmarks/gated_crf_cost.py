"""Cost of the streamed Gated CRF loss beside a plain unfold form: CPU seconds and peak memory, value and gradient.

Each measurement runs in a fresh process on one thread, so that peaks do not mix; the memory is what the process has
at its highest above what it had just before the loss. Goals are ratios of the two forms, so they hold on any machine.

    python benchmarks/gated_crf_cost.py --json cost.json --check
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("streamed", "unfold")
RADIUS, SIGMA_XY, SIGMA_RGB = 5, 6.0, 0.1
BATCH, CLASSES = 2, 21

# Lowest acceptable ratios unfold / streamed, at every size that was run.
# Measured: about 26 and 50.
GOALS = {"seconds": 10.0, "peak_mib": 25.0}
# Largest acceptable relative difference between the two forms' values and gradients (float32).
SAME = 1e-4


def unfold_loss(probabilities, image, mask):
    """The same loss the plain way: all neighbours of all pixels at once; (N, C, window, pixels) is materialised."""
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


def streamed_loss(probabilities, image, mask):
    """The production loss."""
    from training.losses import Kernel, gated_crf_loss

    kernel = Kernel(1.0, {"xy": SIGMA_XY, "rgb": SIGMA_RGB})
    return gated_crf_loss(probabilities, [kernel], {"rgb": image}, RADIUS, mask_src=mask)


def measure(form: str, size: int) -> dict:
    """One form at one size in this process: CPU seconds of the best pass, MiB of the highest, value, gradient."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = torch.randn(BATCH, CLASSES, size, size, requires_grad=True)
    # Smooth patches with a little noise, so that neighbours are alike as in a photograph.
    image = F.interpolate(torch.randn(BATCH, 3, size // 8, size // 8), size=(size, size))
    image += 0.05 * torch.randn(BATCH, 3, size, size)
    mask = torch.ones(BATCH, 1, size, size)
    loss_of = streamed_loss if form == "streamed" else unfold_loss

    def run():
        logits.grad = None
        loss = loss_of(logits.softmax(1), image, mask)
        loss.backward()
        return float(loss.detach())

    # Imports, the softmax and the gradient itself are no cost of the loss.
    logits.softmax(1).square().sum().backward()
    streamed_loss(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.process_time()
        value = run()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # Linux counts in KiB, macOS in bytes.
    peak_mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
    gradient = logits.grad.double()
    return {
        "form": form,
        "size": size,
        "seconds": min(seconds),
        "peak_mib": peak_mib,
        "value": value,
        "gradient_norm": float(gradient.norm()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 128], help="sides of the prediction map")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return 0

    rows = [in_fresh_process(form, size) for size in options.sizes for form in FORMS]
    ratios = [ratio(rows, size) for size in options.sizes]
    print(table(rows, ratios))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=1) + "\n")
    missed = check(rows, ratios) if options.check else []
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def in_fresh_process(form: str, size: int) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", form, str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def ratio(rows: list[dict], size: int) -> dict:
    """How many times as much unfold costs at one size."""
    streamed, unfold = (next(r for r in rows if r["form"] == form and r["size"] == size) for form in FORMS)
    # Below half a MiB the pages of the process itself move the figure.
    return {
        "size": size,
        "seconds": unfold["seconds"] / streamed["seconds"],
        "peak_mib": unfold["peak_mib"] / max(streamed["peak_mib"], 0.5),
    }


def table(rows: list[dict], ratios: list[dict]) -> str:
    """The measurements as a Markdown table with one line on how they were taken."""
    lines = ["| map | form | CPU ms, value and gradient | peak MiB |", "|---|---|---|---|"]
    for row in rows:
        size = f"{row['size']}x{row['size']}"
        lines.append(f"| {size} | {row['form']} | {1e3 * row['seconds']:.0f} | {row['peak_mib']:.1f} |")
    for row in ratios:
        size = f"{row['size']}x{row['size']}"
        lines.append(f"| {size} | unfold / streamed | {row['seconds']:.1f} x | {row['peak_mib']:.1f} x |")
    lines.append("")
    lines.append(
        f"Batch {BATCH}, {CLASSES} classes, radius {RADIUS}, float32, one thread, best of 3; {platform.machine()}."
    )
    return "\n".join(lines)


def check(rows: list[dict], ratios: list[dict]) -> list[str]:
    """What misses its goal."""
    missed = [
        f"{key} at {row['size']}x{row['size']}: unfold / streamed is {row[key]:.2f}, goal {goal}"
        for row in ratios
        for key, goal in GOALS.items()
        if row[key] < goal
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for key in ("value", "gradient_norm"):
            if abs(first[key] - second[key]) > SAME * abs(second[key]):
                missed.append(f"{key} at {first['size']}: {first[key]} streamed, {second[key]} unfold; expected equal")
    return missed


if __name__ == "__main__":
    sys.exit(main())
