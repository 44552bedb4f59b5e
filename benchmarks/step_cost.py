"""What each part of the methods costs: CPU seconds and peak memory of a training step, each in a process of its own.

    python -m benchmarks.step_cost --shared SHARED --json step_cost.json --check

A step is forward, backward, clipping and AdamW on the same crops of voc_animals; of several the least CPU time counts
(user and system; one thread). Memory is the peak over the steps beyond what was resident before the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

_TSCD: dict[str, Any] = {"name": "tscd", "start": 0.0}
_ALONE = {"affinity_weight": 0, "correspondence_weight": 0, "consistency_weight": 0}
_KERNEL = {"kernels": [{"weight": 1.0, "xy": 6.0, "rgb": 0.4}]}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "points": {
        "partial_ce": {"name": "partial_ce"},
        "gated_crf": {"name": "gated_crf", "start": 0.0, **_KERNEL},
        "gated_crf, stride 1": {"name": "gated_crf", "start": 0.0, "stride": 1, **_KERNEL},
        "dfr, kernel only": {"name": "dfr", "start": 0.0, "deep_start": 0.0, "head_weight": 0},
        "dfr, head only": {"name": "dfr", "start": 0.0, "deep_start": 0.0, "weight": 0},
        "dfr": {"name": "dfr", "start": 0.0, "deep_start": 0.0},
        "soft_labels": {"name": "soft_labels", "start": 0.0},
        "partial_ce, absent": {"name": "partial_ce", "absent": {}},
        "partial_ce, spread": {"name": "partial_ce", "spread": {}},
        "partial_ce, teacher": {"name": "partial_ce", "teacher": {"start": 0.0}},
        "partial_ce, refined teacher": {"name": "partial_ce", "teacher": {"start": 0.0, "refine": True}},
    },
    "tags": {
        "tscd before its start": {"name": "tscd", "start": 0.9},
        "+ segmentation, labels without refiner": {**_TSCD, **_ALONE, "labels": {"refiner": "off"}},
        "+ PAR": {**_TSCD, **_ALONE, "labels": {"refiner": "par"}},
        "+ VARM instead": {**_TSCD, **_ALONE},
        "the same, CAMs at one scale": {**_TSCD, **_ALONE, "cams": {"scales": [1.0]}},
        "+ affinity": {**_TSCD, "correspondence_weight": 0, "consistency_weight": 0},
        "the same, labels spread along it": {
            **_TSCD,
            "correspondence_weight": 0,
            "consistency_weight": 0,
            "propagation_start": 0.0,
        },
        "+ self correspondence": {**_TSCD, "consistency_weight": 0},
        "+ consistency (tscd)": _TSCD,
        "tscd, CAMs of SFC": {**_TSCD, "cams": {"kind": "shared_feature", "scales": [1.0]}},
        "sfc, no bank and losses": {
            "name": "sfc",
            "cams": {"bank_draws": 0, "prototype_weight": 0, "scale_weight": 0},
        },
        "sfc, + image bank": {"name": "sfc", "cams": {"prototype_weight": 0, "scale_weight": 0}},
        "sfc, + prototypes (L_P)": {"name": "sfc", "cams": {"scale_weight": 0}},
        "sfc, + scales (L_W)": {"name": "sfc"},
    },
    # The second stage of `tags` and `sfc`, with masks in the place of pseudo-labels.
    "pseudo-labels": {
        "tags": {"name": "tags"},
        "tags, Gated CRF": {"name": "tags", "crf_weight": 0.1, "crf_start": 0.0},
        "tags, correction": {"name": "tags", "correction": {"start": 0.0}},
        "tags, self correspondence": {"name": "tags", "correspondence_weight": 1.0},
    },
}
BASES = {"points": "partial_ce", "tags": "tscd before its start", "pseudo-labels": "tags"}
# Part of a step that the refiner may cost.
GOAL = 0.15


def measure(kind: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process."""
    import torch
    from pydantic import TypeAdapter

    import training.cam.labels
    import training.cam.propagation
    from benchmarks.energy import resident
    from training.cam_stage import build_cam_method
    from training.data.dataset import open_dataset
    from training.data.pipeline import Augmentation, TrainingSet
    from training.methods import Batch, build_method
    from training.methods.settings import MethodSettings
    from training.methods.tag_settings import SFCSettings, TSCDSettings
    from training.optimiser import build_optimizer
    from training.recipe import Optimisation, build_recipe
    from training.trainer import make_fabric, use_plain_attention
    from wsss_deploy.card import Architecture
    from wsss_deploy.networks import build_network, encoder_preprocessing

    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = open_dataset(options.shared / "data" / "voc_animals")
    second = kind == "pseudo-labels"
    labels = "masks" if second else kind
    dataset = TrainingSet(source, source.splits["train"], (labels,), Augmentation(size=options.size), 0)
    items = [dataset[index, index] for index in range(options.batch)]
    raw = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    architecture = Architecture(encoder="vit_tiny_patch16_224", decoder="mlp", decoder_width=256)
    preprocessing = encoder_preprocessing(architecture.encoder, architecture.encoder_options)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    raw["image"] = (raw["image"].float() / 255 - mean) / std
    batch = Batch(**raw)
    weights = options.shared / "weights" / "vit_tiny_patch16_224.safetensors"
    network = build_network(architecture, len(source.classes), weights=str(weights)).train()
    use_plain_attention(network.encoder)
    supervision = "tags" if second else kind
    given = {"device": "cpu", "supervision": supervision, "method": VARIANTS[kind][name]}
    recipe = build_recipe({**given, "augmentation": {"size": options.size}})
    settings = TypeAdapter(MethodSettings).validate_python(VARIANTS[kind][name])
    if isinstance(settings, SFCSettings):
        method = build_cam_method(settings, network.encoder, dataset, recipe)
    else:
        # What the classifier of the first stage costs: an encoder that stays as it is and a linear map.
        first, linear = copy.deepcopy(network.encoder).eval(), torch.randn(192, len(source.classes))

        @torch.no_grad()
        def class_maps(image: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
            return (first(image)[-1].float().movedim(1, -1) @ linear).softmax(dim=-1).movedim(-1, 1)

        parts = (network.encoder, network.decoder, class_maps if second else None)
        if isinstance(settings, TSCDSettings):
            parts = (*parts, build_cam_method(settings, network.encoder, dataset, recipe))
        method = build_method(settings, len(source.classes), preprocessing, None, *parts)
    if method.needs_teacher:
        method.set_teacher(copy.deepcopy(network))
    optimizer = build_optimizer(network.encoder, [network.decoder, method], Optimisation())
    fabric = make_fabric(recipe)
    seconds, refining, peak, before = [], [], 0, resident("VmRSS")
    refine = training.cam.labels.refine

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        refined = refine(*arguments)
        refining[-1] += time.process_time() - started
        return refined

    # One call within a step is more than the noise of two steps' difference.
    training.cam.labels.refine = training.cam.propagation.refine = timed
    for repeat in range(options.repeats + 1):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        started = time.process_time()
        refining.append(0.0)
        with fabric.autocast():
            losses = method(network, batch, 0.5)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if repeat:
            seconds.append(time.process_time() - started)
            peak = max(peak, resident("VmHWM") - before)
    return {
        "kind": kind,
        "variant": name,
        "cpu_s": min(seconds),
        "refiner": statistics.median(part / whole for part, whole in zip(refining[1:], seconds, strict=True)),
        "peak_mb": peak / 1e6,
        "precision": fabric.strategy.precision.precision,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("WSSS_SHARED", "../shared")))
    parser.add_argument("--kinds", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return 0
    rows = []
    for kind in options.kinds:
        for name in VARIANTS[kind]:
            command = [sys.executable, "-m", "benchmarks.step_cost", "--shared", str(options.shared)]
            command += ["--size", str(options.size), "--batch", str(options.batch), "--repeats", str(options.repeats)]
            done = subprocess.run([*command, "--one", kind, name], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print("| labels | step | CPU s | to the first | peak MB |\n|---|---|---|---|---|")
    base = {row["kind"]: row["cpu_s"] for row in rows if row["variant"] == BASES[row["kind"]]}
    for row in rows:
        times = row["cpu_s"] / base[row["kind"]]
        print(f"| {row['kind']} | {row['variant']} | {row['cpu_s']:.2f} | {times:.2f} | {row['peak_mb']:.0f} |")
    missed = []
    if "tags" in options.kinds:
        wanted = ("+ PAR", "+ VARM instead", "the same, CAMs at one scale", "the same, labels spread along it")
        shares = {row["variant"]: row["refiner"] for row in rows if row["variant"] in wanted}
        print("\nThe refiner's part of a step: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items()))
        missed = [f"{name}: {share:.2f} of a step, goal {GOAL}" for name, share in shares.items() if share > GOAL]
    print(
        f"\nViT-Tiny, mlp decoder, {options.batch} crops of {options.size} px, {rows[0]['precision']}, one thread; "
        f"{platform.machine()}, {date.today()}."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "date": str(date.today())}, indent=1) + "\n")
    for line in missed:
        print(f"MISSED {line}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
