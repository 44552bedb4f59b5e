"""A picture of what image tags become: image, CAM, prototype CAM, pseudo-label, prediction, ground truth.

    python -m benchmarks.tags_sheet runs/tags-default-0 DATA --out sheet.png

Of the validation images that the run's model segments best and worst by their own mIoU. Their activation maps and
pseudo-labels are made with their tags for this picture alone; predictions know no tags.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.best_and_worst import image_miou
from training.cam.labels import presence, present_cams, refined_labels, sure_labels
from training.cam.pseudo_labels import network_image, pseudo_label
from training.cam_stage import finished_classifier, long_side_of, whole_image_cams
from training.contact_sheet import SheetRow, contact_sheet
from training.data.dataset import open_dataset
from training.methods.label_rule import label_rule
from training.recipe import build_recipe, read_recipe
from wsss_deploy import Segmenter
from wsss_deploy.networks import encoder_preprocessing

# Least median over the images of what the prediction reaches.
GOAL = 0.5


def shown(cams: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """CAMs (1, K, h, w) as `SheetRow.maps` wants them: float32 (K + 1, *size), the background's map 0."""
    raised = F.interpolate(cams, size=size, mode="bilinear", align_corners=False)
    return F.pad(raised, (0, 0, 0, 0, 1, 0))[0].numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of `tags` or `sfc`")
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, default=4, help="images of each end")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help=f"exit 1 when the median image is below {GOAL}")
    options = parser.parse_args()

    source, segmenter = open_dataset(options.data), Segmenter(options.run / "model.pt", refine=False)
    recipe = build_recipe(read_recipe(options.run / "recipe.yaml"))
    encoder, method = finished_classifier(recipe, options.run, len(source.classes))
    preprocessing = encoder_preprocessing(recipe.model.encoder, recipe.model.encoder_options)
    make = sure_labels if method.knows_background else refined_labels
    scores: dict[str, float] = {}
    for name in source.splits[options.split]:
        if source.tags(name) and "masks" in source.kinds(name):
            prediction = segmenter.predict(source.load_image(name)).mask
            scores[name] = image_miou(prediction, source.load_labels(name, "masks"))
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    chosen = ranked[: options.count] + ranked[-options.count :]
    rows = []
    for name in chosen:
        image, tags = source.load_image(name), source.tags(name) or ()
        view = network_image(image, long_side_of(recipe), preprocessing)
        cams = whole_image_cams(encoder, method, view, tags).cpu()
        label = pseudo_label(image, cams, tags, label_rule(recipe.method.labels), make)
        present, device = presence(tags, cams.shape[1]), next(method.parameters()).device
        # Without a sure position there are no prototypes; some kinds of CAMs have none at all.
        prototypes = method.prototype_cams(encoder, view.to(device), present.to(device))
        found = {"CAM": cams, "Prototype CAM": torch.zeros_like(cams) if prototypes is None else prototypes.cpu()}
        maps = {title: shown(present_cams(part.float(), present), image.shape[:2]) for title, part in found.items()}
        prediction = segmenter.predict(image).mask
        rows.append(SheetRow(image, label, prediction, source.load_labels(name, "masks"), maps))
    median = float(np.median(list(scores.values())))
    caption = "weak label: the pseudo-label; image mIoU " + ", ".join(f"{scores[name]:.2f}" for name in chosen)
    title = f"{options.run.name}: the {options.count} best and the {options.count} worst of {len(ranked)} val images"
    contact_sheet(rows, source.classes, source.palette, title, caption).save(options.out)
    for name in chosen:
        print(f"{scores[name]:.4f} {name}")
    print(f"median {median:.4f}")
    if options.json:
        options.json.write_text(json.dumps({"median": median, "images": scores}, indent=1) + "\n")
    if options.check and median < GOAL:
        print(f"MISSED: the median image has mIoU {median:.4f}, goal {GOAL}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
