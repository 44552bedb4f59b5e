"""Labels that a single stage (`tscd`) makes of its CAMs, as they are and spread along the affinity that it has learnt.

    python -m benchmarks.propagated_labels RUN --data DATA

RUN is a finished run folder of `wsss-train --method tscd`; its checkpoint holds network, classifier and affinity as the
last step left them. Crops of training images with masks, as the run takes them; the masks are read here alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.kernel_purity import crops
from training.cam.attention import AttentionTap
from training.cam.labels import byte_image, refined_labels
from training.cam.propagation import propagated_labels
from training.data.dataset import open_dataset
from training.evaluate import Evaluator
from training.methods import build_method
from training.methods.tscd import TSCD
from training.recipe import Recipe, read_recipe
from training.run import RECIPE
from training.state import CHECKPOINT
from wsss_deploy.artifact import load_model
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.networks.network import restore_network


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="the data set, with masks")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument(
        "--high", type=float, help="background score of the strict pass of spread labels (default: the run's)"
    )
    parser.add_argument("--low", type=float, help="of the loose pass")
    parser.add_argument("--radius", type=int, help="of the window of spread labels, in tokens")
    options = parser.parse_args()
    card, state = load_model(options.run / "model.pt")
    recipe = Recipe.model_validate(read_recipe(options.run / RECIPE))
    network = restore_network(card, state, str(options.run)).eval()
    method = build_method(
        recipe.method, len(card.classes), card.preprocessing, None, network.encoder, network.decoder
    ).eval()
    if not isinstance(method, TSCD) or method.affinity is None:
        raise SystemExit(f"{options.run}: expected a run of wsss-train --method tscd with affinity")
    saved = torch.load(options.run / CHECKPOINT, map_location="cpu", weights_only=True)["module"]
    for module, prefix in ((network, "network."), (method, "method.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    classes = open_dataset(options.data).classes
    own = method.rule
    rule = replace(
        own,
        high=own.high if options.high is None else options.high,
        low=own.low if options.low is None else options.low,
    )
    radius = method.settings.affinity_radius if options.radius is None else options.radius
    kinds = ("of the CAMs", "spread along the affinity")
    evaluators, sure = [Evaluator(classes) for _ in kinds], np.zeros(2)
    spread, count = [], 0
    for batch in crops(recipe, card, options.data, options.images, seed=0):
        tap = AttentionTap(network.encoder)
        with tap:
            network.encoder(batch.image)
        affinity = method.affinity(tap.logits())
        tags = batch.tags[:, 1:]
        cams = method.classifier.cams(network.encoder, batch.image, tags)
        image, stride = byte_image(batch.image, card.preprocessing), network.encoder.reductions[-1]
        grid = tuple(side // stride for side in batch.image.shape[-2:])
        coarse = F.interpolate(cams, size=grid, mode="bilinear")
        made = (
            refined_labels(image, cams, tags, batch.valid, method.rule),
            propagated_labels(image, coarse, tags, batch.valid, affinity, radius, rule),
        )
        for index, labels in enumerate(made):
            for one, mask, inside in zip(labels.numpy(), batch.labels.numpy(), batch.valid.numpy(), strict=True):
                known = one != IGNORE_INDEX
                sure[index] += (known & inside).sum() / inside.sum()
                found, truth = np.where(known, one, 0), np.where(known, mask, IGNORE_INDEX)
                evaluators[index].update(found.astype(np.uint8), truth.astype(np.uint8))
        spread += affinity.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])).unsqueeze(0)
        count += len(batch.image)
    print("| labels | mIoU where sure | sure |\n|---|---|---|")
    for kind, evaluator, part in zip(kinds, evaluators, sure / count, strict=True):
        print(f"| {kind} | {100 * evaluator.result().miou:.1f} | {100 * part:.1f} % |")
    low, middle, high = torch.stack(spread).mean(0).tolist()
    print(f"\naffinity: a tenth below {low:.2f}, half below {middle:.2f}, nine tenths below {high:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
