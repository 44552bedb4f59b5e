"""What every runtime offers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from wsss_deploy.card import Refinement
from wsss_deploy.errors import BackendError, OutOfMemoryError
from wsss_deploy.pairwise import Form

if TYPE_CHECKING:
    from wsss_deploy.refinement import Refiner


#: Pixels (at the network's size) that one inference of `Segmenter.predict_batch` takes at most, unless one image has
#: more, or the runtime knows better.
BATCH_PIXELS = 2_000_000
#: Pixels of all masks that one call of `masks_at` is asked for: they are page-locked for as long as the runtime lives.
MOST_PIXELS = 2**25
#: Pixels of the network for one of the mask, beyond which `masks_at` is not asked: a thread of the GPU reads them all,
#: one by one, and a mask of one pixel would keep it for seconds.
MOST_REDUCED = 4096
#: What `masks_at` gives where the scores that a pixel rests on are not all finite; no class has that number.
NOT_FINITE = 255


class Output(NamedTuple):
    """What a runtime gives for a batch.

    Attributes:
        scores: Class probabilities, float32 (N, C, H, W); refined where a refiner was given.
        refinement_ms: Milliseconds that refining took; at most those of the call where batches of it overlap.
    """

    scores: npt.NDArray[np.float32]
    refinement_ms: float


class Backend(Protocol):
    """A model that is loaded in one runtime. `run` may be called from many threads.

    A runtime that cuts what it is given into batches itself may also have `batch_budget(height, width, masks)`: how
    many images of that size `run`, or `masks`, wants at once. Others get as many as `BATCH_PIXELS` allows.

    Attributes:
        name: "torch", "onnxruntime", "tensorrt" or "openvino".
        device: Where it really runs: "cpu", "cuda:0", ...
    """

    name: str
    device: str

    def run(self, images: npt.NDArray[np.uint8], refiner: Refiner | None = None) -> Output:
        """Class probabilities.

        Args:
            images: RGB, uint8 (N, H, W, 3), any H and W.
            refiner: Applied to the scores where they are, before they leave the device.

        Raises:
            BackendError: The runtime failed.
        """
        ...

    def masks(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids alone, uint8 (N, H, W): less to copy than the scores of `run`, whose best classes they are.

        Args:
            images: As in `run`.

        Raises:
            BackendError: The runtime failed.
        """
        ...

    def refinement_form(self, settings: Refinement) -> Form:
        """The form of the pairwise operator by which `run` refines, and why.

        Args:
            settings: What the refiner was made of.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What really runs: runtime and version, device, precision, threads; plain data."""
        ...


@runtime_checkable
class SizedMasks(Protocol):
    """What a runtime on a GPU may offer in addition: masks of the images' own sizes, without scores on the host."""

    def masks_at_obstacle(self, settings: Refinement | None) -> str | None:
        """Why `masks_at` cannot be used; None if it can.

        Args:
            settings: Of the refinement that is wanted; None for none.
        """
        ...

    def masks_at(
        self, images: npt.NDArray[np.uint8], sizes: Sequence[tuple[int, int]], refiner: Refiner | None
    ) -> list[npt.NDArray[np.uint8]]:
        """The best classes of the scores of `Backend.run`, which are brought to other sizes on the device.

        Args:
            images: As in `Backend.run`.
            sizes: H and W of each mask, together at most `MOST_PIXELS`, and see `MOST_REDUCED`.
            refiner: As in `Backend.run`, one that `masks_at_obstacle` has nothing against.

        Returns:
            uint8 (H, W) each; `NOT_FINITE` where the scores that a pixel rests on are not all finite.

        Raises:
            BackendError: The runtime failed; OutOfMemoryError also where only the refinement found no memory.
        """
        ...


def alone(masks: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """Masks that lie in one array, each in memory of its own: who keeps one would keep all of them."""
    return [mask.copy() for mask in masks] if len(masks) > 1 else list(masks)


# As they stand in what torch, ONNX Runtime, OpenVINO, TensorRT, CUDA, cuBLAS and numpy say.
_SHORT = (
    "out of memory",
    "out_of_memory",
    "memoryallocation",
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "unable to allocate",
    "alloc_failed",
)


def memory_is_short(error: Exception) -> bool:
    """Whether a runtime failed for want of memory, by the error's class or words."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(text in words for text in _SHORT)


def failure(message: str, error: Exception) -> BackendError:
    """The error for a runtime's failure: of its own class where memory was short.

    Args:
        message: For the user.
        error: The runtime's.
    """
    return OutOfMemoryError(message) if memory_is_short(error) else BackendError(message)


def refined_here(scores: Any, images: npt.NDArray[np.uint8], refiner: Refiner | None) -> Output:
    """Scores that lie in the host's memory, refined there.

    Args:
        scores: Floating (N, C, H, W).
        images: As in `Backend.run`.
        refiner: None leaves them as they are.
    """
    if refiner is None:
        return Output(scores, 0.0)
    start = time.perf_counter()
    return Output(refiner(scores.astype(np.float32, copy=False), images), (time.perf_counter() - start) * 1e3)


class Availability(NamedTuple):
    """Whether a runtime can be used here, and why or why not (what to install).

    Attributes:
        available: Whether it can.
        reason: One line for the user.
    """

    available: bool
    reason: str
