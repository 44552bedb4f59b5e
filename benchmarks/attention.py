"""What a training step costs with torch's fused attention and with plain matrix products, on a CPU.

    python benchmarks/attention.py --json attention.json --check

The trainer takes plain products for crops up to 512 pixels (`training.trainer.use_plain_attention`); this says why.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch

from training.trainer import use_plain_attention
from wsss_deploy.card import Architecture
from wsss_deploy.networks import build_network

ENCODERS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "tiny_vit_5m_224")
# Lowest acceptable speed-up of the encoder that the recipes use by default.
GOAL = 1.3


def step_seconds(encoder: str, size: int, batch: int, plain: bool, repeats: int) -> float:
    """CPU seconds of one forward and backward pass in bf16, the best of `repeats`."""
    torch.manual_seed(0)
    network = build_network(Architecture(encoder=encoder, decoder="mlp", decoder_width=256), 7).train()
    if plain:
        use_plain_attention(network.encoder)
    image = torch.randn(batch, 3, size, size)
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(image)
        logits.float().square().mean().backward()
        times.append(time.process_time() - started)
    return min(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    rows = []
    for encoder in ENCODERS:
        fused, plain = (
            step_seconds(encoder, options.size, options.batch, plain, options.repeats) for plain in (False, True)
        )
        rows.append({"encoder": encoder, "fused": fused, "plain": plain, "ratio": fused / plain})
    print("| encoder | fused, CPU s a step | plain, CPU s a step | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['encoder']} | {row['fused']:.2f} | {row['plain']:.2f} | {row['ratio']:.2f} |")
    print(
        f"\nForward and backward, bf16 autocast, {options.size} px, batch {options.batch}, best of {options.repeats}; "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "date": str(date.today())}, indent=1) + "\n")
    if options.check and rows[0]["ratio"] < GOAL:
        print(f"MISSED: {rows[0]['encoder']} is {rows[0]['ratio']:.2f} times as fast with plain products, goal {GOAL}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
