"""Outlines and reliefs of the objects and of the clutter in the synthetic scenes.

An outline is a list of polygons in local coordinates, where the object fills about the unit disc; the first polygon
is the body, those marked as holes are cut out. A relief is a height over the same coordinates; its slopes give the
shading. Colour and colour pattern are no part of a class: they are drawn from one distribution for everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Polygon = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """Polygons, each (points, 2) as (u, v), in the order in which they are filled.

    Attributes:
        filled: Parts of the shape.
        holes: Cut out of the parts.
    """

    filled: tuple[Polygon, ...]
    holes: tuple[Polygon, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One class of objects.

    Attributes:
        name: Class name.
        outline: Draws an outline; objects of a class differ a little.
        relief: (u, v, depth) -> height; depth is the distance to the edge. All in units of the object's radius.
        gloss: Strength of the highlight, 0 to 1.
    """

    name: str
    outline: Callable[[np.random.Generator], Outline]
    relief: Callable[[Array, Array, Array], Array]
    gloss: float


def _polar(radius: npt.NDArray[np.float64], angle: npt.NDArray[np.float64]) -> Polygon:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _turn(count: int) -> npt.NDArray[np.float64]:
    return np.linspace(0, 2 * np.pi, count, endpoint=False)


def _dome(depth: Array, width: float) -> Array:
    """Quarter-circle profile that rises from the edge over `width` and is flat further in."""
    inner = 1 - np.clip(depth / width, 0, 1)
    height: Array = (width * np.sqrt(1 - inner**2)).astype(np.float32)
    return height


def _ball(rng: np.random.Generator) -> Outline:
    return Outline((_polar(np.full(64, 0.95), _turn(64)),))


def _ball_relief(u: Array, v: Array, depth: Array) -> Array:
    # A sphere with the seams of a basketball.
    seams = np.minimum(np.abs(u), np.abs(v))
    for side in (-1, 1):
        seams = np.minimum(seams, np.abs(np.hypot(u - 1.05 * side, v) - 0.7))
    sphere = np.sqrt(np.clip(0.95**2 - u**2 - v**2, 0, None))
    height: Array = (sphere - 0.13 * (seams < 0.055)).astype(np.float32)
    return height


def _ring(rng: np.random.Generator) -> Outline:
    inner = rng.uniform(0.36, 0.48)
    return Outline((_polar(np.full(64, 1.0), _turn(64)),), (_polar(np.full(48, inner), _turn(48)),))


def _ring_relief(u: Array, v: Array, depth: Array) -> Array:
    # A rope: strands that run slantwise around the ring.
    strands = np.abs(np.sin(7 * np.arctan2(v, u) + 5 * np.hypot(u, v)))
    height: Array = _dome(depth, 0.29) + (0.13 * np.sqrt(strands)).astype(np.float32)
    return height


def _star(rng: np.random.Generator) -> Outline:
    radius = np.where(np.arange(10) % 2 == 0, 1.12, rng.uniform(0.5, 0.6))
    return Outline((_polar(radius, _turn(10)),))


def _star_relief(u: Array, v: Array, depth: Array) -> Array:
    # Five ridges, terraced: steps of equal width run parallel to the edge.
    steps = (depth * 7) % 1
    return (0.9 * depth + 0.1 * np.minimum(steps, 4 * (1 - steps))).astype(np.float32)


def _crate(rng: np.random.Generator) -> Outline:
    half = rng.uniform(0.68, 0.86, size=2)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    return Outline((corners * half,))


def _crate_relief(u: Array, v: Array, depth: Array) -> Array:
    frame = depth < 0.2
    brace = np.abs(u - v) < 0.16
    planks = np.where(np.abs((v * 3.6) % 1 - 0.5) > 0.4, -0.06, 0.0)
    return np.where(frame | brace, 0.12 + _dome(depth, 0.05), planks).astype(np.float32)


def _leaf(rng: np.random.Generator) -> Outline:
    # Two arcs that meet in a point, widest a little below the middle, and a short stem.
    t = np.linspace(0, 1, 25)
    half = rng.uniform(0.56, 0.7) * np.sin(np.pi * t**0.8)
    blade = np.concatenate([np.stack([2 * t - 0.95, half], 1), np.stack([2 * t - 0.95, -half], 1)[::-1]])
    stem = np.array([[-1.2, -0.05], [-0.85, -0.06], [-0.85, 0.06], [-1.2, 0.05]])
    return Outline((blade, stem))


def _leaf_relief(u: Array, v: Array, depth: Array) -> Array:
    # Veins leave the midrib at a slant; the blade rises between them.
    across = np.abs(v)
    veins = np.abs(((u - 0.9 * across) * 2.8) % 1 - 0.5)
    rib = np.clip(across / 0.1, 0, 1)
    height: Array = (0.12 * rib + 0.16 * np.clip(veins * 3, 0, 1) * rib + 0.5 * _dome(depth, 0.3)).astype(np.float32)
    return height


def _fish(rng: np.random.Generator) -> Outline:
    t = np.linspace(0, np.pi, 24)
    half = rng.uniform(0.52, 0.64) * np.sin(t) ** 0.8
    x = 0.3 + 0.75 * np.cos(t)
    body = np.concatenate([np.stack([x, half], 1), np.stack([x, -half], 1)[::-1]])
    spread = rng.uniform(0.46, 0.6)
    tail = np.array([[-0.28, 0.2], [-1.1, spread], [-0.92, 0.0], [-1.1, -spread], [-0.28, -0.2]])
    fin = np.array([[0.42, -0.45], [-0.12, -0.8], [-0.06, -0.36]])
    return Outline((body, tail, fin))


def _fish_relief(u: Array, v: Array, depth: Array) -> Array:
    # Rows of scales, every other row shifted by half; a smooth head; rays along the tail; an eye.
    row = np.floor(v * 4.6)
    cell_u, cell_v = (u * 4.6 + 0.5 * (row % 2)) % 1 - 0.5, (v * 4.6) % 1 - 0.5
    scales = 0.16 * np.sqrt(np.clip(1 - (cell_u + 0.5) ** 2 - cell_v**2, 0, None))
    rays = 0.04 * np.cos(v * 28)
    eye = 0.2 * (np.hypot(u - 0.68, v + 0.1) < 0.1)
    skin = np.where(u < -0.35, rays, np.where(u < 0.5, scales, 0.1))
    height: Array = (skin + eye + _dome(depth, 0.42)).astype(np.float32)
    return height


KINDS: tuple[Kind, ...] = (
    Kind("ball", _ball, _ball_relief, 0.55),
    Kind("ring", _ring, _ring_relief, 0.5),
    Kind("star", _star, _star_relief, 0.3),
    Kind("crate", _crate, _crate_relief, 0.05),
    Kind("leaf", _leaf, _leaf_relief, 0.2),
    Kind("fish", _fish, _fish_relief, 0.45),
)


def _pebble(rng: np.random.Generator) -> Outline:
    angle = _turn(40)
    radius = 0.8 + sum(rng.uniform(-0.16, 0.16) * np.cos(n * angle + rng.uniform(0, 6.3)) for n in (2, 3, 4))
    return Outline((_polar(np.asarray(radius), angle) * [1.0, rng.uniform(0.5, 0.8)],))


def _twig(rng: np.random.Generator) -> Outline:
    x = np.linspace(-1.3, 1.3, 12)
    bend = rng.uniform(-0.35, 0.35) * np.cos(x * rng.uniform(0.8, 2.2))
    half = rng.uniform(0.08, 0.16) * (1 + 0.3 * rng.standard_normal(12).clip(-1, 1))
    return Outline((np.concatenate([np.stack([x, bend + half], 1), np.stack([x, bend - half], 1)[::-1]]),))


def _shard(rng: np.random.Generator) -> Outline:
    count = int(rng.integers(3, 5))
    return Outline((_polar(rng.uniform(0.55, 1.1, count), _turn(count) + rng.uniform(-0.4, 0.4, count)),))


# What lies about and belongs to the background; lit and shadowed like the objects.
CLUTTER: tuple[Kind, ...] = (
    Kind("pebble", _pebble, lambda u, v, depth: _dome(depth, 0.5), 0.25),
    Kind("twig", _twig, lambda u, v, depth: _dome(depth, 0.14), 0.1),
    Kind("shard", _shard, lambda u, v, depth: _dome(depth, 0.12), 0.4),
)
