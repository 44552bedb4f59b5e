"""A data set with weak labels that are simulated from its masks."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import KINDS, DataSource, WrappedSource, has_background
from training.data.weak import simulate_points, simulate_scribbles, simulate_tags
from wsss_deploy.errors import UsageError


class SimulatedSource(WrappedSource):
    """`source`, where every image with a mask and without labels of `kind` gets simulated ones.

    The labels of an image depend on the seed, its name and its mask only. Nothing is written to disk; what was
    made is kept in memory, compressed.

    Args:
        source: A data set.
        kind: "scribbles", "points" or "tags".
        seed: Seed of the simulation.
        length: Relative length of scribbles, 0 to 1.
        width: Width of scribbles in pixels.

    Raises:
        UsageError: `kind` cannot be simulated.
    """

    def __init__(self, source: DataSource, kind: str, seed: int, length: float = 1.0, width: int = 3) -> None:
        if kind not in KINDS or kind == "masks":
            raise UsageError(f"cannot simulate {kind}; expected scribbles, points or tags")
        super().__init__(source)
        self._kind, self._seed = kind, seed
        self._length, self._width = length, width
        self._made: dict[str, tuple[bytes, tuple[int, int]]] = {}

    def kinds(self, name: str) -> frozenset[str]:
        """Real kinds, and the simulated one where there is a mask."""
        kinds = self._source.kinds(name)
        return kinds | {self._kind} if "masks" in kinds else kinds

    def load_labels(self, name: str, kind: str) -> NDArray[np.uint8]:
        """Labels uint8 (H, W): real ones where they are, else simulated."""
        if not self._is_simulated(name, kind):
            return self._source.load_labels(name, kind)
        # Drawing takes some ten times as long as reading, and sparse maps shrink to about a kilobyte.
        if name not in self._made:
            labels = self._simulate(name, kind)
            self._made[name] = (zlib.compress(labels.tobytes(), 1), (labels.shape[0], labels.shape[1]))
        packed, shape = self._made[name]
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape).copy()

    def _simulate(self, name: str, kind: str) -> NDArray[np.uint8]:
        mask = self._source.load_labels(name, "masks")
        # crc32, since Python's own hash of a text differs from process to process.
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if kind == "scribbles":
            return simulate_scribbles(mask, rng, self._length, self._width)
        return simulate_points(mask, rng)

    def tags(self, name: str) -> tuple[int, ...] | None:
        """Real tags where they are, else those of the mask if tags are simulated."""
        if not self._is_simulated(name, "tags"):
            return self._source.tags(name)
        return simulate_tags(self._source.load_labels(name, "masks"), has_background(self.classes))

    def _is_simulated(self, name: str, kind: str) -> bool:
        kinds = self._source.kinds(name)
        return kind == self._kind and kind not in kinds and "masks" in kinds
