"""What DFR's kernels link: pixels of one class or of two, at borders, by the masks that its training never reads.

    python -m benchmarks.kernel_purity RUN ... --data DATA

RUN is a finished run folder of `wsss-train --method dfr`, whose checkpoint holds network and head as the last step left
them. Crops of training images with masks, as the run takes them; the loss's own resolution and window. Only pairs
count of which one pixel or both have another class in their window.

Purity is the kernel's weight between pixels of one class over all its weight; kept is what the kernel leaves of the
position term's weight between pixels of one class, and between pixels of two. Without a kernel's help purity is
that of "position alone"; a kernel that leaves as much between two classes as within one adds nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.dataset import open_dataset
from training.data.pipeline import TrainingSet
from training.methods import Batch, build_method
from training.methods.base import IMAGENET_MEAN, IMAGENET_STD, to_units
from training.methods.dfr import DFR
from training.methods.feature_head import plain_features
from training.recipe import Recipe, read_recipe
from training.run import RECIPE
from training.state import CHECKPOINT
from wsss_deploy.artifact import load_model
from wsss_deploy.card import IGNORE_INDEX, ModelCard
from wsss_deploy.networks import SegmentationNetwork
from wsss_deploy.networks.network import restore_network

SIGMAS_RGB, SIGMAS_DEEP = (0.1, 0.4), (0.1, 0.25, 0.5)


def offsets(radius: int) -> list[tuple[int, int]]:
    """A square window without its middle; half of it, for pairs are unordered."""
    span = range(-radius, radius + 1)
    return [(dy, dx) for dy in span for dx in span if (dy, dx) > (0, 0)]


def pairs(maps: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pairs (y, x), (y + dy, x + dx) of maps (..., H, W)."""
    height, width = maps.shape[-2:]
    left, right = max(0, -dx), width - max(0, dx)
    return maps[..., : height - dy, left:right], maps[..., dy:, left + dx : right + dx]


class Sums:
    """A kernel's weight within a class and between two, beside the position term's."""

    def __init__(self) -> None:
        self.weight = torch.zeros(2, dtype=torch.float64)
        self.position = torch.zeros(2, dtype=torch.float64)

    def add(self, weight: Tensor, position: float, same: Tensor, counted: Tensor) -> None:
        """Pairs of one offset."""
        for index, which in enumerate((counted & same, counted & ~same)):
            self.weight[index] += position * weight[which].sum().double()
            self.position[index] += position * int(which.sum())

    def row(self) -> dict[str, float]:
        """Purity, and the parts kept."""
        within, between = (self.weight / self.position).tolist()
        return {"purity": float(self.weight[0] / self.weight.sum()), "within": within, "between": between}


def crops(recipe: Recipe, card: ModelCard, data: Path, images: int, seed: int) -> Iterator[Batch]:
    """Batches of crops of training images with masks."""
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std))
    source = open_dataset(data)
    names = [name for name in source.splits["train"] if "masks" in source.kinds(name)][:images]
    found = TrainingSet(source, names, ("masks",), recipe.augmentation, seed=seed)
    for start in range(0, len(names), 8):
        items = [found[index, index] for index in range(start, min(start + 8, len(names)))]
        stacked = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        yield Batch(**stacked | {"image": (stacked["image"] - mean) / std})


def combined(method: DFR, squares: dict[str, Tensor]) -> Tensor:
    """The run's kernel without its position term, from squared distances by modality."""
    terms = []
    for kernel in method._kernels(True):
        exponent = sum(squares[name] / (2 * sigma**2) for name, sigma in kernel.sigmas.items() if name != "xy")
        terms.append(kernel.weight * torch.exp(-torch.as_tensor(exponent)))
    return torch.stack(terms).sum(0)


@torch.no_grad()
def measure(
    network: SegmentationNetwork, method: DFR, card: ModelCard, recipe: Recipe, data: Path, images: int
) -> dict[str, dict[str, float]]:
    """Rows by kernel; the last is the run's own."""
    settings, head = method.settings, method.head
    if settings.features == "decoder":
        raise SystemExit("features of a decoder are not looked at; expected method.features: stages or last")
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    found: dict[str, Sums] = {}
    for batch in crops(recipe, card, data, images, seed=0):
        size = tuple(side // settings.stride for side in batch.image.shape[-2:])
        levels = network.forward_features(batch.image)
        levels = levels[-1:] if settings.features == "last" else levels
        features = {"encoder maps": F.normalize(plain_features(levels, size), dim=1)}
        if head is not None:
            features["head"] = F.normalize(head(levels, size).float(), dim=1, eps=1e-12)
        rgb = F.adaptive_avg_pool2d(to_units(batch.image.float(), card.preprocessing, mean, std), size)
        labels = F.interpolate(batch.labels[:, None].float(), size=size, mode="nearest")[:, 0].long()
        known = labels != IGNORE_INDEX
        radius = settings.radius
        high = F.max_pool2d(labels.masked_fill(~known, -1)[:, None].float(), 2 * radius + 1, 1, radius)
        low = -F.max_pool2d(-labels.masked_fill(~known, 999)[:, None].float(), 2 * radius + 1, 1, radius)
        border = (high != low)[:, 0] & known
        for dy, dx in offsets(radius):
            ends = [pairs(maps, dy, dx) for maps in (labels, known, border)]
            same = ends[0][0] == ends[0][1]
            counted = ends[1][0] & ends[1][1] & (ends[2][0] | ends[2][1])
            position = float(torch.exp(torch.tensor(-(dy * dy + dx * dx) / (2 * settings.xy**2))))
            colour = (pairs(rgb, dy, dx)[0] - pairs(rgb, dy, dx)[1]).square().sum(1)
            weights = {"position alone": torch.ones_like(colour)}
            for sigma in SIGMAS_RGB:
                weights[f"colour, sigma {sigma}"] = torch.exp(-colour / (2 * sigma**2))
            for name, maps in features.items():
                distance = (pairs(maps, dy, dx)[0] - pairs(maps, dy, dx)[1]).square().sum(1)
                for sigma in SIGMAS_DEEP:
                    weights[f"{name}, sigma {sigma}"] = torch.exp(-distance / (2 * sigma**2))
                together = colour / (2 * settings.rgb**2) + distance / (2 * settings.feature**2)
                weights[f"colour x {name}"] = torch.exp(-together)
                # Of the run's own features, which come last.
                weights["as trained"] = combined(method, {"rgb": colour, "feat": distance})
            for name, weight in weights.items():
                found.setdefault(name, Sums()).add(weight, position, same, counted)
    return {name: sums.row() for name, sums in found.items()}


def opened(folder: Path) -> tuple[SegmentationNetwork, DFR, ModelCard, Recipe]:
    """Network, method, card and recipe of a run."""
    card, state = load_model(folder / "model.pt")
    recipe = Recipe.model_validate(read_recipe(folder / RECIPE))
    network = restore_network(card, state, str(folder))
    counts = [1] * len(card.classes)
    method = build_method(
        recipe.method, len(card.classes), card.preprocessing, counts, network.encoder, network.decoder
    )
    if not isinstance(method, DFR):
        raise SystemExit(f"{folder}: a run of {recipe.method.name!r}, expected one of wsss-train --method dfr")
    saved = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["module"]
    for module, prefix in ((network, "network."), (method, "method.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    return network.eval(), method.eval(), card, recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="the data set, with masks")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    everything = {}
    for folder in options.runs:
        network, method, card, recipe = opened(folder)
        rows = everything[str(folder.name)] = measure(network, method, card, recipe, options.data, options.images)
        print(f"\n{folder.name}\n\n| kernel | purity | kept within a class | kept between classes |\n|---|---|---|---|")
        for name, row in rows.items():
            print(f"| {name} | {100 * row['purity']:.1f} % | {row['within']:.2f} | {row['between']:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
