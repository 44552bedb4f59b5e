"""Open a model and segment images with it."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsss_deploy.artifact import check_path, read_card
from wsss_deploy.backends import check_device_name, open_backend
from wsss_deploy.backends.base import BATCH_PIXELS, MOST_PIXELS, MOST_REDUCED, NOT_FINITE, Backend, SizedMasks, alone
from wsss_deploy.card import ModelCard, Sizing
from wsss_deploy.errors import ArtifactError, ImageError, OutOfMemoryError, UsageError
from wsss_deploy.images import ImageSource, load_image
from wsss_deploy.refinement import Asked, decide
from wsss_deploy.segmentation import Segmentation
from wsss_deploy.sizing import is_cut, network_size, resized
from wsss_deploy.tiling import ArrayWindows, Block, Tiling, WindowReader, joined, predict_blocks

if TYPE_CHECKING:
    from wsss_deploy.networks import SegmentationNetwork

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class Segmenter:
    """A model that is ready to segment images.

    One segmenter may be used from many threads at once: it holds no state that predicting changes, and runtimes allow
    concurrent inference or let calls take turns (ONNX Runtime on a GPU). With several threads of one's own, a small
    `threads` avoids that they compete.

    Args:
        path: `model.pt` (needs torch), `model.onnx` (onnxruntime), `model.engine` (tensorrt) or `model.xml` (openvino).
        device: "auto" takes a CUDA device if one really works, else the CPU; "cpu", "cuda" and "cuda:N" are taken
            literally or fail.
        backend: "auto" (by the kind of file), "torch", "onnxruntime", "tensorrt" or "openvino".
        threads: CPU threads of one inference; None leaves the runtime's own number, or in ONNX Runtime and OpenVINO
            what this process may use where that is less than the machine (`wsss_deploy.environment.thread_limit`). In
            torch this is a setting of the whole process, which None leaves.
        refine: Whether the scores are refined along the image's edges: None leaves it to the model's card, False is
            never, True always, with the card's parameters or else `wsss_deploy.refinement.DEFAULT`; a
            `PairwiseParameters` or a `wsss_deploy.card.Refinement` is taken as it is.
        sizing: In place of the card's plan of the size at which the network sees an image.

    Raises:
        ArtifactError: The file is absent, damaged or not ours.
        BackendError: Its runtime is not installed or cannot run on that device.
        UsageError: An argument is none of the known ones, or `refine` contradicts a graph that refines by itself.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        refine: Asked = None,
        sizing: Sizing | None = None,
    ) -> None:
        model = check_path(path)
        self._source = model.name
        self._card = read_card(model)
        if sizing is not None:
            self._card = self._card.model_copy(update={"sizing": sizing})
            self._check_tile(sizing.tile or 0)
        self._choice = decide(refine, self._card, in_graph=model.suffix.lower() != ".pt")
        self._refiner = self._choice.refiner(threads)
        self._backend: Backend = open_backend(model, device, backend, threads)
        if self._refiner is not None:
            # A form on a GPU compiles its kernels and is compared when it is chosen: now, not in the first prediction.
            self._backend.refinement_form(self._refiner.settings)

    @classmethod
    def from_network(
        cls,
        network: SegmentationNetwork,
        card: ModelCard,
        device: str = "cpu",
        refine: Asked = None,
    ) -> Self:
        """Use a network that is already in memory, for example during training.

        The network is not copied. It is moved to the device and switched to evaluation mode, here and at every
        prediction: call `network.train()` before training on.

        Args:
            network: The network.
            card: What the model's file would say.
            device: As in the class.
            refine: As in the class.

        Raises:
            BackendError: The device does not work.
            UsageError: `refine` cannot be used.
        """
        check_device_name(device)
        from wsss_deploy.backends.torch_backend import TorchBackend

        segmenter = cls.__new__(cls)
        segmenter._source = "network in memory"
        segmenter._card = card
        segmenter._choice = decide(refine, card, in_graph=False)
        segmenter._refiner = segmenter._choice.refiner()
        segmenter._backend = TorchBackend(network, card, device)
        return segmenter

    @property
    def card(self) -> ModelCard:
        """The model's card: classes, palette, sizing, how it was trained."""
        return self._card

    @property
    def runtime(self) -> Backend:
        """The runtime that the model is loaded in; of use for measuring it alone."""
        return self._backend

    def describe(self) -> dict[str, Any]:
        """What really runs: model, runtime and its version, device or providers, precision, threads; plain data.

        `masks` tells where `predict_masks` brings masks to the images' sizes. `refinement` holds `form` ("none",
        "graph", or the form of the pairwise operator), `reason` (who decided), and with a form also `summary`, `guide`,
        `parameters` and why that form.
        """
        told = {"model": self._source, "classes": len(self._card.classes), **self._backend.describe()}
        reason = self._masks_at_obstacle()
        told["masks"] = "on the device" if reason is None else f"on the host: {reason}"
        return told | {"refinement": self._choice.describe(self._backend.refinement_form)}

    def predict(self, image: ImageSource) -> Segmentation:
        """Segment one image.

        Args:
            image: Anything that `wsss_deploy.images.load_image` reads.

        Returns:
            The result; its mask has the size of the upright image.

        Raises:
            ImageError: The image cannot be used.
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[ImageSource]) -> list[Segmentation]:
        """Segment several images; those of one size at the network go through it together.

        Args:
            images: Anything that `wsss_deploy.images.load_image` reads; a batch array is given as `list(array)`.

        Returns:
            The results in the order of the images.

        Raises:
            ImageError: One of the images cannot be used; it is named.
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
            UsageError: It is one image.
        """
        _check_several(images, "predict_batch")
        prepared: list[_Prepared] = []
        for index, image in enumerate(images):
            try:
                prepared.append(self._prepare(image))
            except ImageError as error:
                if len(images) == 1:
                    raise
                raise ImageError(f"image {index + 1} of {len(images)}: {error}") from error
        groups: dict[tuple[int, int], list[int]] = {}
        results: dict[int, Segmentation] = {}
        for index, item in enumerate(prepared):
            if is_cut(item.image.shape[0], item.image.shape[1], self._card):
                results[index] = self.predict_tiled(item.image)
                continue
            groups.setdefault(item.resized.shape[:2], []).append(index)
        for (height, width), members in groups.items():
            count = self._at_once(height, width, masks=False)
            for start in range(0, len(members), count):
                part = members[start : start + count]
                results.update(zip(part, _halving(self._infer, [prepared[index] for index in part]), strict=True))
        return [results[index] for index in range(len(prepared))]

    def predict_masks(self, images: Sequence[ImageSource]) -> list[npt.NDArray[np.uint8]]:
        """The masks of several images alone: what `predict_batch` gives, with less to copy.

        Where the network sees an image at its own size and nothing is refined outside of the graph, only class ids
        leave the runtime and its device; on a GPU, with TensorRT and ONNX Runtime, also of images of other sizes and of
        refined scores (up to 2^25 pixels an image; `describe()["masks"]` tells). Others go through `predict_batch`.

        Args:
            images: As in `predict_batch`.

        Returns:
            Masks, uint8 (H, W), in the order of the images.

        Raises:
            ImageError: One of the images cannot be used; it is named.
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
            UsageError: It is one image.
        """
        _check_several(images, "predict_masks")
        pixels = [load_image(image) for image in images]
        found: dict[int, npt.NDArray[np.uint8]] = {}
        direct: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(pixels):
            tiled = is_cut(image.shape[0], image.shape[1], self._card)
            kept = network_size(image.shape[0], image.shape[1], self._card) == image.shape[:2]
            if kept and not tiled and self._refiner is None:
                direct.setdefault(image.shape, []).append(index)
        for (height, width, _), members in direct.items():
            count = self._at_once(height, width, masks=True)
            for start in range(0, len(members), count):
                part = members[start : start + count]
                masks = _halving(lambda batch: alone(self._backend.masks(np.stack(batch))), [pixels[i] for i in part])
                found.update(zip(part, masks, strict=True))
        found.update(self._masks_from_device({i: image for i, image in enumerate(pixels) if i not in found}))
        rest = [index for index in range(len(pixels)) if index not in found]
        results = self.predict_batch([pixels[index] for index in rest])
        found.update((index, result.mask) for index, result in zip(rest, results, strict=True))
        return [found[index] for index in range(len(pixels))]

    def _masks_from_device(self, images: dict[int, npt.NDArray[np.uint8]]) -> dict[int, npt.NDArray[np.uint8]]:
        """Masks of those images whose scores the runtime brings to their size on its device, if it does so."""
        backend, found = self._backend, dict[int, npt.NDArray[np.uint8]]()
        if not isinstance(backend, SizedMasks):
            return found
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in images.items():
            height, width, _ = image.shape
            seen = network_size(height, width, self._card)
            suits = MOST_REDUCED * height * width >= seen[0] * seen[1] and height * width <= MOST_PIXELS
            if suits and not is_cut(height, width, self._card):
                groups.setdefault(seen, []).append(index)
        if not groups or self._masks_at_obstacle() is not None:
            return found

        def made(part: list[int]) -> list[npt.NDArray[np.uint8] | None]:
            seen = np.stack([resized(images[index], self._card) for index in part])
            try:
                return [*backend.masks_at(seen, [images[index].shape[:2] for index in part], self._refiner)]
            except OutOfMemoryError as error:
                if len(part) > 1:
                    raise
                _log.warning("No room to make a mask on the GPU (%s); the image's scores go to the host", error)
                return [None]

        for (height, width), members in groups.items():
            count = self._at_once(height, width, masks=False)
            for part in _parts(members, [images[i].shape[0] * images[i].shape[1] for i in members], count):
                masks = {i: mask for i, mask in zip(part, _halving(made, part), strict=True) if mask is not None}
                if any(mask.max() == NOT_FINITE for mask in masks.values()):
                    raise self._not_finite()
                found |= masks
        return found

    def _masks_at_obstacle(self) -> str | None:
        """Why the runtime does not bring masks to the images' sizes on its device."""
        if not isinstance(self._backend, SizedMasks):
            return "this runtime gives scores"
        return self._backend.masks_at_obstacle(None if self._refiner is None else self._refiner.settings)

    def predict_tiled(self, image: ImageSource, tiling: Tiling | None = None) -> Segmentation:
        """Segment one image at its own size in overlapping windows, whose scores are blended.

        Args:
            image: Anything that `load_image` reads.
            tiling: How to cut it; None takes the card's plan, or else windows of 512 pixels that share 64.

        Returns:
            The result; it keeps no scores. `timing["inference"]` is everything between reading and the mask.

        Raises:
            ImageError: The image cannot be used.
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
            UsageError: The windows are larger than the model's fixed size.
        """
        start = time.perf_counter()
        pixels = load_image(image)
        timing = {"pre": _milliseconds(start), "inference": 0.0, "refinement": 0.0, "post": 0.0}
        start = time.perf_counter()
        mask, confidence = joined(self.predict_blocks(ArrayWindows(pixels), tiling), *pixels.shape[:2])
        timing["inference"] = _milliseconds(start)
        return Segmentation.from_mask(mask, confidence, pixels, self._card, timing)

    def predict_blocks(self, image: WindowReader, tiling: Tiling | None = None) -> Iterator[Block]:
        """Segment an image of any size that is read by windows, in constant memory.

        Args:
            image: `wsss_deploy.tiling.ArrayWindows` of a memory map, a zarr array and the like, or your own reader.
            tiling: As in `predict_tiled`.

        Yields:
            Finished blocks that cover the image, see `wsss_deploy.tiling.predict_blocks`.

        Raises:
            ImageError: The reader gives something else than it was asked for.
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
            UsageError: The windows are larger than the model's fixed size.
        """
        sizing, fixed = self._card.sizing, self._card.preprocessing.fixed_size
        if tiling is None:
            tile = sizing.tile or min(512, fixed or 512)
            tiling = Tiling(tile, min(sizing.overlap, tile // 2))
        self._check_tile(tiling.tile)
        return predict_blocks(self, image, tiling)

    def _check_tile(self, tile: int) -> None:
        fixed = self._card.preprocessing.fixed_size
        if fixed is not None and tile > fixed:
            raise UsageError(f"windows of {tile} pixels, but {self._source} takes at most {fixed}; use that")

    def scores_of(self, windows: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Class probabilities of images of one size at which the network sees them as they are, refined if that is on.

        Args:
            windows: RGB, uint8 (H, W, 3).

        Returns:
            float32 (N, C, H, W).

        Raises:
            BackendError: The runtime failed.
            ArtifactError: The model gives no usable scores.
        """
        scores, _ = self._backend.run(np.stack(windows), self._refiner)
        self._check(scores, (len(windows), *windows[0].shape[:2]))
        return scores

    def predict_stream(
        self, images: Iterable[ImageSource], batch: int = 1, ahead: int = 4, workers: int = 2
    ) -> Iterator[Segmentation]:
        """Segment images as they come, for example the frames of a video, in their order.

        Args:
            images: Asked for the next one only from the thread that takes the results, which keeps what it got (paths
                aside): the source may put its next frame into the same buffer.
            batch: Images that are given to `predict_batch` together.
            ahead: Batches that are read at most beyond the one whose results are next. With 0, and batch 1, each
                result is given before the next image is asked for, as a source needs that waits for the answer. Else
                at least one more batch is read before a result is given.
            workers: Threads that predict.

        Yields:
            Results in the order of the images. An error of an image, or of the source, is raised in its place, after
            all results before it.

        Raises:
            ImageError: An image cannot be used; its number in the stream is named.
            BackendError: The runtime failed.
            UsageError: A number is too small, or `images` is one image.
        """
        from wsss_deploy.streaming import predict_stream

        _check_several(images, "predict_stream")
        return predict_stream(self.predict_batch, images, batch, ahead, workers)

    def _check(self, scores: npt.NDArray[np.float32], shape: tuple[int, ...]) -> None:
        count, height, width = shape
        expected = (count, len(self._card.classes), height, width)
        if scores.shape != expected:
            raise ArtifactError(
                f"{self._source}: gave scores of shape {scores.shape}, its card promises {expected}; export it again"
            )
        # The sum of both is finite only if all scores are, and needs no copy of them.
        if not np.isfinite(scores.min() + scores.max()):
            raise self._not_finite()

    def _not_finite(self) -> ArtifactError:
        return ArtifactError(
            f"{self._source}: gave scores that are not finite (NaN or infinite); its weights are damaged or its "
            "training diverged: train it again, with a lower learning rate if that repeats"
        )

    def _prepare(self, source: ImageSource) -> _Prepared:
        start = time.perf_counter()
        image = load_image(source)
        seen = resized(image, self._card)
        return _Prepared(image, seen, _milliseconds(start))

    def _at_once(self, height: int, width: int, masks: bool) -> int:
        """Images of one size that are given to the runtime together, for their masks alone or for scores."""
        budget: Callable[[int, int, bool], int] | None = getattr(self._backend, "batch_budget", None)
        return max(1, BATCH_PIXELS // (height * width)) if budget is None else budget(height, width, masks)

    def _infer(self, batch: list[_Prepared]) -> list[Segmentation]:
        start = time.perf_counter()
        scores, refinement = self._backend.run(np.stack([item.resized for item in batch]), self._refiner)
        refinement /= len(batch)
        inference = _milliseconds(start) / len(batch) - refinement
        self._check(scores, (len(batch), *batch[0].resized.shape[:2]))
        return [self._result(item, part, inference, refinement) for item, part in zip(batch, scores, strict=True)]

    def _result(
        self, item: _Prepared, scores: npt.NDArray[np.float32], inference: float, refinement: float
    ) -> Segmentation:
        start = time.perf_counter()
        timing = {"pre": item.milliseconds, "inference": inference, "refinement": refinement, "post": 0.0}
        result = Segmentation(scores, item.image, self._card.classes, self._card.palette, timing)
        timing["post"] = _milliseconds(start)
        return result


class _Prepared(NamedTuple):
    """An image, the same at the network's size, and how long that took."""

    image: npt.NDArray[np.uint8]
    resized: npt.NDArray[np.uint8]
    milliseconds: float


def _parts(members: list[int], pixels: list[int], count: int) -> Iterator[list[int]]:
    """Members in groups of so many, and of `MOST_PIXELS` at most."""
    part: list[int] = []
    held = 0
    for index, size in zip(members, pixels, strict=True):
        if part and (len(part) == count or held + size > MOST_PIXELS):
            yield part
            part, held = [], 0
        part.append(index)
        held += size
    yield part


def _check_several(images: object, method: str) -> None:
    """Refuse one image where several are expected: its letters or rows would be taken for images."""
    dimensions = len(getattr(images, "shape", ()))  # 1: a column of paths
    if dimensions in (2, 3) or isinstance(
        images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | io.IOBase
    ):
        found = f"{type(images).__name__} of {dimensions} dimensions" if dimensions else type(images).__name__
        raise UsageError(f"{method} takes several images, found one ({found}); use predict, or pass a list of images")


def _milliseconds(since: float) -> float:
    return (time.perf_counter() - since) * 1e3


def _halving(run: Callable[[list[_Item]], list[_Result]], batch: list[_Item]) -> list[_Result]:
    """Run a batch; if it does not fit into memory, its halves."""
    try:
        return run(batch)
    except OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Not in the handler: while it lasts, the failed call's memory is held.
    _log.warning("A batch of %d images does not fit into memory; half of it is tried", len(batch))
    middle = len(batch) // 2
    return [*_halving(run, batch[:middle]), *_halving(run, batch[middle:])]
