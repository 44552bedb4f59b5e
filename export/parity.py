"""Does an exported model give what torch gives? On the graph itself, and through the whole way from file to mask."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from export.patterns import MOST_IMAGES, pattern_image
from wsss_deploy import Segmenter, __version__
from wsss_deploy.artifact import load_model, read_card
from wsss_deploy.backends.tensorrt import TensorRTBackend
from wsss_deploy.bench.accuracy import find_pairs, mean_iou
from wsss_deploy.card import ModelCard
from wsss_deploy.engine_manifest import read_manifest
from wsss_deploy.errors import ParityError
from wsss_deploy.images import load_image
from wsss_deploy.networks import DeployedNetwork, RefinedNetwork, restore_network
from wsss_deploy.sizing import seen_size
from wsss_deploy.tiling import seen_parts

# Read when onnxruntime is imported: an export reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

REPORT_FAILED = "parity_failed.json"
MOST_LABELLED = 50
#: Windows of an image that is cut into them; whole masks, of all windows, are compared besides.
MOST_WINDOWS = 4
#: Share of the compared pixels below which a class's IoU is that of a few pixels, and chance.
SMALLEST_CLASS = 0.001
PATTERN = "pattern"

_Images = npt.NDArray[np.uint8]
_Item = TypeVar("_Item", "Case", "Final")
_Network = DeployedNetwork | RefinedNetwork


@dataclass(frozen=True)
class Thresholds:
    """What still counts as the same result.

    Attributes:
        score_max: Largest absolute difference of a probability.
        score_mean: Mean absolute difference of the probabilities.
        tie: Where torch's two best classes are closer than this, either may win. Twice `score_max`: whatever
            differs beyond it cannot come from differences that `score_max` allows. (Not of int8, whose `score_max`
            allows anything.)
        wrong: Largest share of pixels that differ elsewhere.
        final_agreement: Least share of equal pixels in the final masks.
        class_iou: Least IoU of either's final masks for each class that torch gives to at least `SMALLEST_CLASS` of
            the pixels. Without it, a small class could be lost altogether within `final_agreement`.
        miou_drop: Largest loss of mIoU on labelled images, of 1.
        patterns: Whether the limits hold on made-up images, too, or on real ones only.
    """

    score_max: float = 1e-3
    score_mean: float = 1e-5
    tie: float = 2e-3
    wrong: float = 0.0
    final_agreement: float = 0.999
    class_iou: float = 0.98
    miou_drop: float = 0.001
    patterns: bool = True


#: Limits by precision. What a float16 or int8 network may differ by is what its users would not notice, not what
#: rounding explains; int8 is calibrated on photographs and is not held to made-up patterns.
THRESHOLDS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(0.1, 2e-3, 0.2, final_agreement=0.99, class_iou=0.9, miou_drop=0.003),
    "bf16": Thresholds(0.25, 5e-3, 0.5, final_agreement=0.98, class_iou=0.75, miou_drop=0.003),
    "int8": Thresholds(1.0, 0.03, 0.5, wrong=0.01, final_agreement=0.95, class_iou=0.5, miou_drop=0.01, patterns=False),
}


@dataclass(frozen=True)
class Case:
    """One batch through the graph and through torch.

    Attributes:
        source: Where the images come from.
        shape: (N, H, W).
        score_max: Largest absolute difference of a probability.
        score_mean: Mean absolute difference.
        agreement: Share of pixels whose class ids are equal.
        ties: Pixels that differ where torch's two best classes are closer than the threshold.
        wrong: Pixels that differ elsewhere.
    """

    source: str
    shape: tuple[int, int, int]
    score_max: float
    score_mean: float
    agreement: float
    ties: int
    wrong: int


@dataclass(frozen=True)
class Final:
    """One image through `Segmenter` with either file, resizing and upsampling included.

    Attributes:
        source: Where the image comes from.
        size: (H, W) of the image.
        agreement: Share of equal pixels of the two masks.
        confusion: Pixels by torch's class and the exported model's, (C, C).
    """

    source: str
    size: tuple[int, int]
    agreement: float
    confusion: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and the verdict.

    Attributes:
        problems: What exceeded a threshold; empty if the model passed.
        thresholds: The limits.
        cases: The graph's outputs.
        final: The final masks.
        miou: mIoU of torch and of the graph on labelled images; None without any.
        providers: ONNX Runtime's providers that the session really had.
        model_sha256: Digest of the ONNX file.
        card: The ONNX file's card: digest of the tensors, opset.
        seconds: Time that the check took.
    """

    problems: tuple[str, ...]
    thresholds: Thresholds
    cases: tuple[Case, ...]
    final: tuple[Final, ...]
    miou: tuple[float, float] | None
    providers: tuple[str, ...]
    model_sha256: str
    card: ModelCard
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing exceeded a threshold."""
        return not self.problems

    def to_json(self) -> str:
        """The content of `parity.json`."""
        content: dict[str, Any] = {
            "verdict": "passed" if self.passed else "failed",
            "problems": self.problems,
            "model_sha256": self.model_sha256,
            "digests": self.card.digests,
            "score_max": max(case.score_max for case in self.cases),
            "score_mean": max(case.score_mean for case in self.cases),
            "agreement": min(case.agreement for case in _judged(self.cases, self.thresholds)),
            "final_agreement": min(item.agreement for item in _judged(self.final, self.thresholds)),
            "classes": {
                self.card.classes[index]: {"share": round(share, 6), "iou": round(iou, 6)}
                for index, share, iou in class_ious(_judged(self.final, self.thresholds))
            },
            "miou": None if self.miou is None else {"torch": self.miou[0], "exported": self.miou[1]},
            "precision": self.card.precision,
            "thresholds": dataclasses.asdict(self.thresholds),
            "providers": self.providers,
            "versions": {
                **self.card.versions,
                "wsss-deploy": __version__,
                "torch": torch.__version__,
                "onnxruntime": onnxruntime.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "seconds": round(self.seconds, 2),
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "final": [{"source": f.source, "size": f.size, "agreement": f.agreement} for f in self.final],
        }
        return json.dumps(content, indent=2) + "\n"


def check_parity(
    model: Path,
    candidate: Path,
    images: Sequence[Path] = (),
    thresholds: Thresholds = Thresholds(),
    data: tuple[Path, str] | None = None,
) -> ParityReport:
    """Compare an ONNX file with the `model.pt` that it was made from, on the CPU.

    The graph is compared with `DeployedNetwork`, and with the plain torch refinement behind it where the graph refines,
    on procedural images of several sizes (smaller than the stride, odd, not square, one and two images a batch) and on
    the real images at the size at which the network sees them. The final masks are compared through `Segmenter`.

    Args:
        model: The `model.pt`.
        candidate: The ONNX file.
        images: Image files; the first `MOST_IMAGES` are used.
        thresholds: The limits.
        data: Folder with masks and its split, for the mIoU of both.

    Raises:
        ArtifactError: One of the files cannot be used.
        ImageError: An image cannot be used.
        ParityError: The exported graph cannot be run at all.
    """
    start = time.perf_counter()
    _, state_dict = load_model(model)
    card = read_card(candidate)  # the exported one: what the file promises is what is compared
    network = restore_network(card, state_dict, str(model))
    deployed = DeployedNetwork(network, card.preprocessing).eval()
    refined = card.refinement if card.refinement is not None and card.refinement.in_graph else None
    reference = deployed if refined is None else RefinedNetwork(deployed, refined).eval()
    session = _open(candidate)
    real = [(path.name, load_image(path)) for path in images[:MOST_IMAGES]]
    cases = tuple(
        _compare(reference, session, name, batch, thresholds)
        for name, batch in _batches(card, real)
        if session.accepts(batch.shape[:3])
    )
    photos = [(PATTERN, pattern_image(height, width, 1)) for height, width in ((480, 640), (333, 217))]
    both = Segmenter.from_network(network, card), Segmenter(candidate, device=session.device)
    seen = [
        (name, image)
        for name, image in (*real, *photos)
        if session.accepts((1, *seen_size(image.shape[0], image.shape[1], card)))
    ]
    final = tuple(_final(*both, seen))
    if not cases or not final:
        raise ParityError(f"{candidate.name}: takes none of the sizes that are compared; choose wider --shapes")
    miou = None if data is None else _mean_ious(both, data)
    problems = [problem for case in _judged(cases, thresholds) for problem in _case_problems(case, thresholds)]
    problems += [
        f"final mask of {item.source}: {item.agreement:.4%} of the pixels agree, not {thresholds.final_agreement:.1%}"
        for item in _judged(final, thresholds)
        if item.agreement < thresholds.final_agreement
    ]
    problems += [
        f"class '{card.classes[index]}': IoU {iou:.3f} with torch's masks, not {thresholds.class_iou:g}"
        for index, share, iou in class_ious(_judged(final, thresholds))
        if share >= SMALLEST_CLASS and iou < thresholds.class_iou
    ]
    if miou is not None and not miou[0] - miou[1] <= thresholds.miou_drop:
        problems.append(f"mIoU falls from {miou[0]:.4f} to {miou[1]:.4f}, allowed is {thresholds.miou_drop:g}")
    return ParityReport(
        tuple(problems),
        thresholds,
        cases,
        final,
        miou,
        session.providers,
        hashlib.sha256(candidate.read_bytes()).hexdigest(),
        card,
        time.perf_counter() - start,
    )


def class_ious(final: Sequence[Final]) -> list[tuple[int, float, float]]:
    """Of each class that torch gives anywhere: id, share of the pixels, and IoU of the two masks over all images.

    Args:
        final: Images through `Segmenter` with either file.
    """
    confusion = np.sum([item.confusion for item in final], axis=0)
    expected, both = confusion.sum(axis=1), np.diag(confusion)
    either = expected + confusion.sum(axis=0) - both
    total = int(expected.sum())
    return [(int(k), float(expected[k] / total), float(both[k] / either[k])) for k in np.flatnonzero(expected)]


def _judged(items: Sequence[_Item], thresholds: Thresholds) -> Sequence[_Item]:
    """What the limits hold for; everything where that is nothing."""
    real = [item for item in items if item.source != PATTERN]
    return items if thresholds.patterns or not real else real


def _mean_ious(both: tuple[Segmenter, Segmenter], data: tuple[Path, str]) -> tuple[float, float]:
    pairs = find_pairs(*data, most=MOST_LABELLED)
    return mean_iou(both[0], pairs), mean_iou(both[1], pairs)


class _Session:
    """The graph in ONNX Runtime on the CPU; unlike the runtime's backend it gives scores and mask in one call."""

    device = "cpu"

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure is told once, by the error
        # torch computes in turn with it here; threads that spin while they wait would only slow that down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exception classes share no base but Exception
            raise ParityError(f"ONNX Runtime cannot load the exported graph: {_first_line(error)}") from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())

    def run(self, batch: _Images) -> tuple[npt.NDArray[np.float32], _Images]:
        try:
            scores, mask = self._session.run(["scores", "mask"], {"image": batch})
        except Exception as error:  # as above
            raise ParityError(f"ONNX Runtime fails on images of {batch.shape[:3]}: {_first_line(error)}") from error
        return scores, mask

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Any batch, height and width."""
        return True


class _EngineSession:
    """An engine on the first GPU."""

    device = "cuda:0"

    def __init__(self, path: Path) -> None:
        self._backend = TensorRTBackend(path, self.device)
        self._manifest = read_manifest(path)
        self.providers: tuple[str, ...] = (f"TensorRT {self._manifest.tensorrt} on {self._manifest.gpu}",)

    def run(self, batch: _Images) -> tuple[npt.NDArray[np.float32], _Images]:
        return self._backend.run(batch).scores, self._backend.masks(batch)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """What lies within the profile."""
        return self._manifest.accepts(shape)


class _OpenVinoSession:
    """A model in OpenVINO on the CPU."""

    device = "cpu"

    def __init__(self, path: Path) -> None:
        # Imported here: an extra that other exports do not need.
        from wsss_deploy.backends.openvino_backend import OpenVinoBackend

        self._backend = OpenVinoBackend(path, self.device)
        told = self._backend.describe()
        if read_card(path).precision == "bf16" and told["precision"] != "bf16":
            raise ParityError(
                f"{path.name}: this CPU has no bf16 and computes in {told['precision']}, so that bf16 cannot be "
                "compared with torch here; export it on a CPU that has it, or take --precision fp32"
            )
        self.providers: tuple[str, ...] = (f"OpenVINO {told['version']} in {told['precision']}",)

    def run(self, batch: _Images) -> tuple[npt.NDArray[np.float32], _Images]:
        return self._backend.run(batch).scores, self._backend.masks(batch)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Any batch, height and width."""
        return True


def _open(candidate: Path) -> _AnySession:
    if candidate.suffix == ".engine":
        return _EngineSession(candidate)
    return _OpenVinoSession(candidate) if candidate.suffix == ".xml" else _Session(candidate)


_AnySession = _Session | _EngineSession | _OpenVinoSession


def _batches(card: ModelCard, real: Sequence[tuple[str, _Images]]) -> Iterator[tuple[str, _Images]]:
    stride = card.preprocessing.stride
    high, wide = seen_size(480, 640, card)
    sizes = [
        (1, high, wide),
        (2, 3 * stride + 5, 4 * stride - 1),
        (1, 4 * stride, 6 * stride),
        (1, stride // 2, 2 * stride + 1),
        (1, 1, 1),
    ]
    largest = card.preprocessing.fixed_size or 10**9
    for count, height, width in sizes:
        if max(height, width) > largest:
            continue
        yield PATTERN, np.stack([pattern_image(height, width, seed) for seed in range(count)])
    for name, image in real:
        for seen in seen_parts(image, card, MOST_WINDOWS):
            yield name, np.array(seen)[None]


def _compare(reference: _Network, session: _AnySession, source: str, batch: _Images, thresholds: Thresholds) -> Case:
    with torch.inference_mode():
        expected_scores, expected_mask = (output.numpy() for output in reference(torch.from_numpy(batch)))
    scores, mask = session.run(batch)
    if scores.shape != expected_scores.shape or mask.shape != expected_mask.shape:
        raise ParityError(
            f"the exported graph gives scores {scores.shape} and mask {mask.shape} for images of {batch.shape[:3]}, "
            f"torch gives {expected_scores.shape} and {expected_mask.shape}"
        )
    error = np.abs(scores - expected_scores)
    best = np.sort(expected_scores, axis=1)
    tied = best[:, -1] - best[:, -2] < thresholds.tie
    differs = mask != expected_mask
    count, height, width = batch.shape[:3]
    return Case(
        source=source,
        shape=(count, height, width),
        score_max=float(error.max()),
        score_mean=float(error.mean()),
        agreement=1.0 - float(differs.mean()),
        ties=int((differs & tied).sum()),
        wrong=int((differs & ~tied).sum()),
    )


def _case_problems(case: Case, thresholds: Thresholds) -> Iterator[str]:
    where = f"{case.source} {' x '.join(map(str, case.shape))}"
    # Written so that NaN fails.
    if not case.score_max <= thresholds.score_max:
        yield f"{where}: a probability differs by {case.score_max:.2g}, at most {thresholds.score_max:g} is allowed"
    if not case.score_mean <= thresholds.score_mean:
        yield f"{where}: probabilities differ by {case.score_mean:.2g} on average, allowed is {thresholds.score_mean:g}"
    if not case.wrong <= thresholds.wrong * math.prod(case.shape):
        yield f"{where}: {case.wrong} pixels have another class, where torch's best two are {thresholds.tie:g} apart"


def _final(expected: Segmenter, candidate: Segmenter, images: Sequence[tuple[str, _Images]]) -> Iterator[Final]:
    for source, image in images:
        first, second = expected.predict(image).mask, candidate.predict(image).mask
        count = len(expected.card.classes)
        pairs = np.bincount(first.ravel().astype(np.int64) * count + second.ravel(), minlength=count * count)
        size = (image.shape[0], image.shape[1])
        yield Final(source, size, float((first == second).mean()), pairs.reshape(count, count))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
