"""Masks of the images' own sizes made where a runtime left its scores: on the GPU, in the runtime's own stream.

Scores have four bytes a class and pixel and a mask one byte a pixel: with this, only images go up and masks come down,
also where the network sees images at another size than their own. **Not run yet on a GPU**: what is tested is the
kernel's code and the order of launches, by a stand-in for the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

import numpy as np
import numpy.typing as npt

from wsss_deploy.backends.base import alone, memory_is_short
from wsss_deploy.backends.device_layer import Buffers, DeviceLayer
from wsss_deploy.pairwise import cuda_source
from wsss_deploy.pairwise.cuda_launch import Place, launch_at
from wsss_deploy.upsampling import best_class

KERNEL = "wsss_best_class"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Program:
    """`best_class.cu`."""

    def ptx(self, architecture: str) -> bytes:
        return cuda_source.compile_program(mask_source(), "best_class.cu", architecture)


def mask_source() -> str:
    """The whole program in one text."""
    return "#define WSSS_BEST_CLASS\n" + (files("wsss_deploy.backends") / "best_class.cu").read_text()


def parted(masks: npt.NDArray[np.uint8], sizes: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
    """Masks (H, W) of a row of them, one behind the other."""
    ends = np.cumsum([height * width for height, width in sizes])
    return alone([mask.reshape(size) for mask, size in zip(np.split(masks, ends[:-1]), sizes, strict=True)])


class DeviceMasks:
    """Makes masks in one stream, in a buffer that is kept; for one thread at a time, in which the device is active.

    Args:
        layer: The device.
        place: Its number, the stream's handle and the compute capability.
        stream: Of the layer; the masks follow what is in it.
        obstacles: What was found by `obstacle`, shared by all that work on one device.
    """

    def __init__(self, layer: DeviceLayer, place: Place, stream: object, obstacles: dict[str, str | None]) -> None:
        self._layer, self._place, self._stream, self._obstacles = layer, place, stream, obstacles
        self._buffers = Buffers(layer)

    def release(self) -> None:
        """Give the buffer back."""
        self._buffers.release()

    def __call__(self, scores: int, shape: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> int:
        """Put the making of masks into the stream.

        Args:
            scores: Address of float32 (N, C, h, w), none of them 0.
            shape: Of the scores.
            sizes: H and W of each image.

        Returns:
            Address of the masks, uint8, one behind the other; the next call overwrites them. Where the scores that a
            pixel rests on are not all finite, it is `base.NOT_FINITE`.

        Raises:
            BackendError: The kernel cannot be compiled or launched, or memory is short.
        """
        assert len(sizes) == shape[0]
        masks = place = self._buffers.device("masks", sum(height * width for height, width in sizes))
        for (height, width), equal in groupby(sizes):
            count = len(list(equal))
            given = (count, *shape[1:], height, width)
            launch_at(self._place, _Program(), KERNEL, [scores], given, [place])
            scores += 4 * int(np.prod(given[:4]))
            place += count * height * width
        return masks

    def obstacle(self) -> str | None:
        """Why masks cannot be made here; None if they can: small ones then equal the host's on this device."""
        if KERNEL in self._obstacles:
            return self._obstacles[KERNEL]
        try:
            wrong = self._wrong()
        except Exception as error:  # whatever ails it, the host is there
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            if memory_is_short(error):  # which may pass
                self.release()
                return reason
        else:
            if wrong < 1e-3:  # two classes may be equal but for rounding
                self._obstacles[KERNEL] = None
                return None
            reason = f"{100 * wrong:.1f} % of the pixels differ from the host's on this device"
        _log.warning("Masks are brought to the images' sizes on the host, not on the GPU: %s", reason)
        self._obstacles[KERNEL] = reason
        return reason

    def _wrong(self) -> float:
        """Part of the pixels of small masks, enlarged, reduced and both, that are another class than on the host."""
        layer, random = self._layer, np.random.default_rng(0)
        sizes = [(37, 41), (37, 41), (7, 9), (40, 5), (13, 17)]
        scores = self._buffers.host("scores", (len(sizes), 5, 13, 17), np.float32)
        scores[...] = random.random(scores.shape, np.float32)
        given = self._buffers.device("scores", scores.nbytes)
        layer.upload(given, scores, self._stream)
        address = self(given, scores.shape, sizes)
        masks = self._buffers.host("found", (sum(height * width for height, width in sizes),), np.uint8)
        layer.download(masks, address, self._stream)
        layer.wait(self._stream)
        expected = [best_class(each, *size)[0].ravel() for each, size in zip(scores, sizes, strict=True)]
        return float(np.mean(masks != np.concatenate(expected)))
