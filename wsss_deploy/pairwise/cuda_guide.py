"""The guide made on the device from an image that is there already.

**Not run yet on a GPU**; the kernel's code is tested by a stand-in for the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from wsss_deploy.pairwise import cuda_source
from wsss_deploy.pairwise.cuda_launch import Place, launch_at
from wsss_deploy.pairwise.guides import Guide

KERNEL = "wsss_pairwise_guide"


@dataclass(frozen=True)
class _Program:
    """`guide.cu` for one kind of guide."""

    kind: Guide

    def ptx(self, architecture: str) -> bytes:
        return cuda_source.compile_program(guide_source(self.kind), "guide.cu", architecture)


def guide_source(kind: Guide) -> str:
    """The whole program in one text."""
    text = (files("wsss_deploy.pairwise") / "csrc" / "guide.cu").read_text()
    return f"#define WSSS_OPPONENT {int(kind == 'opponent')}\n{text}"


def make_guide_at(place: Place, kind: Guide, images: int, shape: tuple[int, int, int], guide: int) -> None:
    """Write what `guides.make_guide` gives, bit by bit.

    Args:
        place: Device and stream.
        kind: See `make_guide`.
        images: Address of RGB bytes, (N, H, W, 3).
        shape: (N, H, W), none of them 0.
        guide: Address of room for float32 (N, 3, H, W).

    Raises:
        BackendError: See `cuda_launch.launch`.
    """
    launch_at(place, _Program(kind), KERNEL, [images], shape, [guide])
