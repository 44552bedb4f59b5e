"""Colours and colour patterns: one distribution for every object, the clutter and the ground."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]


def draw_color(rng: np.random.Generator) -> Array:
    """A colour of the shared distribution: any hue, from dull to vivid, from dark to light.

    Returns:
        RGB in [0, 1], shape (3,).
    """
    hue, saturation, value = rng.uniform(), rng.beta(2.0, 1.8), rng.uniform(0.3, 0.95)
    return np.asarray(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def noise(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 3) -> Array:
    """Smooth random field (value noise): octaves of half the size and half the strength each.

    Args:
        rng: Source of randomness.
        height: Rows.
        width: Columns.
        cell: Size of the coarsest features, in pixels.
        octaves: Number of scales.

    Returns:
        (height, width) in [0, 1].
    """
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = max(cell / 2**octave, 1.0)
        grid = rng.standard_normal((int(height / step) + 3, int(width / step) + 3)).astype(np.float32)
        box = (0.5, 0.5, 0.5 + width / step, 0.5 + height / step)
        smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=box)
        field += 0.5**octave * np.asarray(smooth)
    low, high = field.min(), field.max()
    scaled: Array = (field - low) / max(high - low, 1e-6)
    return scaled


def _soft(value: Array, sharpness: float) -> Array:
    weight: Array = (0.5 + 0.5 * np.tanh(sharpness * value)).astype(np.float32)
    return weight


def draw_pattern(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """How much of the second colour there is at each place: plain, mottled, striped, spotted, chequered or veined.

    Args:
        rng: Source of randomness.
        u: (H, W) local coordinate; about two units across an object.
        v: (H, W) the other local coordinate.

    Returns:
        (H, W) in [0, 1].
    """
    height, width = u.shape
    turn, frequency = rng.uniform(0, np.pi), rng.uniform(1.6, 3.2)
    a, b = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    a, b = a + rng.uniform(), b + rng.uniform()
    kind = rng.integers(6)
    if kind == 2:
        return _soft(np.sin(2 * np.pi * frequency * 0.6 * a), 3)
    if kind == 3:
        cell_a, cell_b = (a * frequency) % 1 - 0.5, (b * frequency) % 1 - 0.5
        return _soft(0.3 - np.hypot(cell_a, cell_b), 14)
    if kind == 4:
        return _soft(np.sin(np.pi * frequency * a) * np.sin(np.pi * frequency * b), 8)
    grain = noise(rng, height, width, max(width / rng.uniform(3, 7), 2.0))
    if kind == 0:
        return 0.35 * grain
    if kind == 1:
        return _soft(grain - 0.5, 6)
    return _soft(0.12 - np.abs(np.sin(4 * a * frequency / 2 + 5 * grain)), 8)


def paint(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Albedo of a surface: two colours mixed by a pattern, with a fine grain.

    Args:
        rng: Source of randomness.
        u: (H, W) local coordinate.
        v: (H, W) the other local coordinate.

    Returns:
        (H, W, 3) in [0, 1].
    """
    first, second = draw_color(rng), draw_color(rng)
    second = first + rng.uniform(0.15, 0.5) * (second - first)
    weight = draw_pattern(rng, u, v)[..., None]
    height, width = u.shape
    grain = 1 + 0.12 * (noise(rng, height, width, cell=4.0, octaves=2)[..., None] - 0.5)
    albedo: Array = np.clip((first * (1 - weight) + second * weight) * grain, 0, 1).astype(np.float32)
    return albedo
