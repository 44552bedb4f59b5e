"""Network scores of a val split, cached, and what refined scores are worth; used by `benchmarks.refinement`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from training.data.dataset import open_dataset
from training.evaluate import Evaluator
from training.run import split_names
from wsss_deploy.artifact import load_model
from wsss_deploy.card import ModelCard
from wsss_deploy.networks import DeployedNetwork, restore_network
from wsss_deploy.pairwise import PairwiseParameters, refine
from wsss_deploy.pairwise.guides import make_guide
from wsss_deploy.sizing import network_size
from wsss_deploy.upsampling import best_class, upsample

#: Principal components of the network's features that serve as guide channels.
COMPONENTS = 8
GUIDES = ("rgb", "opponent", "lab", "rgb+features", "rgb+scores")


@dataclass(frozen=True)
class Candidate:
    """A refinement that is tried; None parameters are the network alone.

    Attributes:
        parameters: The operator.
        guide: One of `GUIDES`; features are the decoder's at stride 4, reduced to components of unit deviation,
            scores the network's own.
        native: At the image's own size, in place of the network's.
    """

    parameters: PairwiseParameters | None
    guide: str = "rgb"
    native: bool = False

    def __str__(self) -> str:
        if self.parameters is None:
            return "none"
        given = self.parameters
        parts = [given.kind, " ".join(map(str, given.dilations)), f"x{given.iterations}"]
        parts += [f"bandwidth {given.bandwidth:g}"] if given.bandwidth else []
        for term in given.terms:
            sigmas = {"colour": term.sigma_rgb, "features": term.sigma_features, "xy": term.sigma_xy}
            parts += [f"{name} {sigma:g}" for name, sigma in sigmas.items() if sigma is not None]
        parts += [f"mean field {given.mean_field.compatibility:g}"] if given.mean_field else []
        return ", ".join([*parts, "at native size"] if self.native else parts)


@dataclass
class Sample:
    """One image; arrays at the network's size unless said otherwise."""

    image: NDArray[np.uint8]
    native: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    scores: NDArray[np.float32]
    features: NDArray[np.float32] | None
    kept: dict[Any, NDArray[np.float32]] = field(default_factory=dict)

    def guide(self, kind: str, native: bool) -> NDArray[np.float32]:
        """float32 (1, G, H, W); the last one is kept, since candidates that follow one another share it."""
        if (kind, native) not in self.kept:
            self.kept = {(kind, native): np.ascontiguousarray(self._guide(kind, native))}
        return self.kept[kind, native]

    def _guide(self, kind: str, native: bool) -> NDArray[np.float32]:
        image = self.native if native else self.image
        if kind == "lab":
            from skimage.color import rgb2lab

            return rgb2lab(image).astype(np.float32).transpose(2, 0, 1)[None] / 100
        if kind in ("rgb", "opponent"):
            return make_guide(image[None], kind)
        more = self.scores if kind == "rgb+scores" else self.features
        if more is None or native:
            raise SystemExit(f"guide {kind} is offered at the network's size and for decoders with features only")
        return np.concatenate([make_guide(image[None], "rgb"), more], axis=1)


@dataclass
class Model:
    """A model, its val split and what the network said about it."""

    name: str
    card: ModelCard
    classes: tuple[str, ...]
    samples: list[Sample]
    network_cpu_ms: float


def load(model: Path, data: Path, split: str, every: int, cache: Path) -> Model:
    """The network's scores for every `every`-th image of a split; computed once and kept in `cache`."""
    card, state_dict = load_model(model)
    source = open_dataset(data)
    names = split_names(source, split)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    folder = cache / f"{source.name}-{split}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    deployed = DeployedNetwork(restore_network(card, state_dict, str(model)), card.preprocessing).eval()
    samples, spent = [], []
    for name in names[::every]:
        native = source.load_image(name)
        height, width = network_size(*native.shape[:2], card)
        image = native
        if (height, width) != native.shape[:2]:
            image = np.asarray(Image.fromarray(native).resize((width, height), Image.Resampling.BILINEAR))
        file = folder / f"{Path(name).name}.npz"
        if not file.is_file():
            np.savez(file, **_forward(deployed, image))
        with np.load(file) as kept:
            stored = dict(kept)
        spent.append(float(stored["cpu_ms"]))
        scores = F.softmax(_enlarge(stored["logits"], stored["padded"], image), dim=1).numpy()
        features = _enlarge(stored["features"], stored["padded"], image).numpy() if "features" in stored else None
        truth = source.load_labels(name, "masks")
        samples.append(Sample(image, native, truth, np.ascontiguousarray(scores), features))
    return Model(f"{model.parent.name}", card, tuple(source.classes), samples, float(np.median(spent)))


def _forward(deployed: DeployedNetwork, image: NDArray[np.uint8]) -> dict[str, Any]:
    """Logits at stride 4, CPU time, and the decoder's features where it has a module `mix`."""
    seen: list[torch.Tensor] = []
    mix = getattr(deployed.network.decoder, "mix", None)
    hook = mix.register_forward_hook(lambda *given: seen.append(given[2])) if mix is not None else None
    with torch.inference_mode():
        padded = deployed._pad(torch.from_numpy(image.copy())[None])
        start = time.process_time()
        logits = deployed.network(padded.permute(0, 3, 1, 2).float() * deployed.scale + deployed.shift)
        spent = (time.process_time() - start) * 1e3
    if hook is not None:
        hook.remove()
    result = {"logits": logits.numpy(), "padded": np.array(padded.shape[1:3]), "cpu_ms": spent}
    if seen:
        values = seen[0][0].flatten(1)
        values = values - values.mean(1, keepdim=True)
        directions = torch.linalg.eigh(values @ values.T).eigenvectors[:, -COMPONENTS:]
        components = (directions.T @ values).reshape(1, -1, *seen[0].shape[2:])
        result["features"] = (components / components.std()).numpy()
    return result


def _enlarge(values: NDArray[np.float32], padded: NDArray[Any], image: NDArray[np.uint8]) -> torch.Tensor:
    size = int(padded[0]), int(padded[1])
    large = F.interpolate(torch.from_numpy(values), size=size, mode="bilinear", align_corners=False)
    return large[:, :, : image.shape[0], : image.shape[1]]


def measure(model: Model, candidate: Candidate, every: int = 1) -> dict[str, float]:
    """Figures at native size (mIoU, boundary IoU), and the refinement's median CPU milliseconds without the guide."""
    evaluator, spent = Evaluator(model.classes), [0.0]
    for sample in model.samples[::every]:
        scores = sample.scores
        if candidate.parameters is not None:
            guide = sample.guide(candidate.guide, candidate.native)
            if candidate.native:
                scores = np.ascontiguousarray(upsample(scores[0], *sample.truth.shape)[None])
            start = time.process_time()
            scores = refine(scores, guide, candidate.parameters, threads=1)
            spent.append((time.process_time() - start) * 1e3)
        evaluator.update(best_class(scores[0], *sample.truth.shape)[0], sample.truth)
    result = evaluator.result()
    return {"miou": result.miou, "boundary": result.mean_boundary_iou, "cpu_ms": float(np.median(spent[1:] or [0]))}


def mean_gain(rows: Sequence[dict[str, float]], base: Sequence[dict[str, float]], figure: str) -> float:
    """Mean over models of a figure's gain."""
    return float(np.mean([row[figure] - before[figure] for row, before in zip(rows, base, strict=True)]))
