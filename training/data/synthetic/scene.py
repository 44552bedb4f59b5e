"""One synthetic scene: objects and clutter on a textured ground under one light, with the exact mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from training.data.synthetic.shapes import CLUTTER, KINDS, Kind, Outline
from training.data.synthetic.surfaces import Array, noise, paint

CLASSES: tuple[str, ...] = ("background", *(kind.name for kind in KINDS))
_SUPERSAMPLING = 2  # objects are shaded on a finer grid and averaged, which gives clean edges


@dataclass(frozen=True)
class Placement:
    """An object in a scene.

    Attributes:
        kind: What it is.
        label: Class id; 0 for clutter.
        x: Centre, pixels.
        y: Centre, pixels.
        radius: Pixels.
        angle: Rotation, radians.
    """

    kind: Kind
    label: int
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Light:
    """The scene's one light.

    Attributes:
        direction: Unit vector towards the light (x right, y down, z towards the viewer).
        ambient: Share of the light that comes from everywhere.
        tint: RGB factor.
    """

    direction: Array
    ambient: float
    tint: Array

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Light:
        """A light from any side, from fairly low to high."""
        azimuth, elevation = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(35, 65))
        flat = np.cos(elevation)
        direction = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], np.float32)
        warmth = rng.uniform(-0.07, 0.07)
        return cls(direction, rng.uniform(0.38, 0.55), np.array([1 + warmth, 1, 1 - warmth], np.float32))

    def shade(self, albedo: Array, height: Array, gloss: float) -> Array:
        """Lambert shading with a Blinn highlight.

        Args:
            albedo: (H, W, 3).
            height: (H, W) relief, in pixels of the same grid.
            gloss: Strength of the highlight.

        Returns:
            (H, W, 3), not clipped.
        """
        slope_y, slope_x = np.gradient(height)
        length = np.sqrt(slope_x**2 + slope_y**2 + 1)
        x, y, z = self.direction
        diffuse = np.clip((z - x * slope_x - y * slope_y) / length, 0, None)
        half = self.direction + np.array([0, 0, 1], np.float32)
        half /= np.linalg.norm(half)
        specular = np.clip((half[2] - half[0] * slope_x - half[1] * slope_y) / length, 0, 1) ** 24
        lit = self.ambient + (1.25 - self.ambient) * diffuse / max(float(z), 0.6)
        shaded: Array = albedo * (lit[..., None] * self.tint) + gloss * specular[..., None]
        return shaded


def draw_scene(rng: np.random.Generator, size: int = 128) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw one scene.

    Args:
        rng: Source of randomness; the same state gives the same scene.
        size: Side, pixels.

    Returns:
        Image (size, size, 3) and mask (size, size) of class ids, exact: a pixel belongs to the topmost object that
        covers at least half of it.
    """
    light = Light.draw(rng)
    canvas = _ground(rng, size, light)
    mask = np.zeros((size, size), np.uint8)
    for placement in (*_scatter(rng, size), *_arrange(rng, size)):
        paint_object(rng, canvas, mask, placement, light)
    falloff_y, falloff_x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    falloff = 1 + 0.12 * (light.direction[0] * falloff_x + light.direction[1] * falloff_y)
    canvas *= falloff[..., None]
    canvas += rng.normal(0, 0.012, canvas.shape)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def _ground(rng: np.random.Generator, size: int, light: Light) -> Array:
    v, u = np.mgrid[-2 : 2 : size * 1j, -2 : 2 : size * 1j].astype(np.float32)
    albedo = paint(rng, u, v)
    relief = noise(rng, size, size, rng.uniform(6, 24), octaves=4) * rng.uniform(0.5, 4)
    return light.shade(albedo * rng.uniform(0.75, 1.0), relief.astype(np.float32), 0.0)


def _scatter(rng: np.random.Generator, size: int) -> list[Placement]:
    """Clutter: anywhere, small to middling."""
    pieces = []
    for _ in range(int(rng.integers(4, 10))):
        kind = CLUTTER[int(rng.integers(len(CLUTTER)))]
        x, y = rng.uniform(0, size, 2)
        radius = size * rng.uniform(0.03, 0.1)
        pieces.append(Placement(kind, 0, x, y, radius, rng.uniform(0, 2 * np.pi)))
    return pieces


def _arrange(rng: np.random.Generator, size: int) -> list[Placement]:
    """Objects, from the lowest to the topmost; they may overlap, but none hides another."""
    objects: list[Placement] = []
    wanted = int(rng.integers(4, 7))
    for _ in range(40):
        if len(objects) == wanted:
            break
        index = int(rng.integers(len(KINDS)))
        radius = size * rng.uniform(0.16, 0.27)
        x, y = rng.uniform(0.08 * size, 0.92 * size, 2)
        if all(np.hypot(x - o.x, y - o.y) > 0.72 * (radius + o.radius) for o in objects):
            objects.append(Placement(KINDS[index], index + 1, x, y, radius, rng.uniform(0, 2 * np.pi)))
    return objects


def paint_object(
    rng: np.random.Generator,
    canvas: Array,
    mask: npt.NDArray[np.uint8],
    placement: Placement,
    light: Light,
) -> None:
    """Paint one object with its shadow over what is there.

    Args:
        rng: Source of randomness: variation of the outline, colours, pattern.
        canvas: (size, size, 3), changed in place.
        mask: (size, size) class ids, changed in place.
        placement: The object.
        light: The scene's light.
    """
    size, fine = mask.shape[0], _SUPERSAMPLING
    reach = int(np.ceil(1.35 * placement.radius)) + 2
    left, top = int(placement.x) - reach, int(placement.y) - reach
    side = 2 * reach * fine
    scale = placement.radius * fine

    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    x = (columns + 0.5 - (placement.x - left) * fine) / scale
    y = (rows + 0.5 - (placement.y - top) * fine) / scale
    cos, sin = np.float32(np.cos(placement.angle)), np.float32(np.sin(placement.angle))
    u, v = x * cos + y * sin, y * cos - x * sin

    inside = _fill(placement, placement.kind.outline(rng), left, top, side)
    depth = ndimage.distance_transform_edt(inside).astype(np.float32) / scale
    height = ndimage.gaussian_filter(placement.kind.relief(u, v, depth) * scale, 0.8)
    color = light.shade(paint(rng, u, v), height, placement.kind.gloss)
    color *= (1 - 0.35 * np.exp(-depth * scale / fine))[..., None]  # the rim catches less light
    alpha = _average(inside.astype(np.float32))
    least: Array = np.maximum(alpha, 1e-6)
    color = _average(np.clip(color, 0, 1) * inside[..., None]) / least[..., None]

    # A block that reaches over the image's border is cut to what lies inside.
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + 2 * reach, size), min(left + 2 * reach, size)
    block = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    target = np.s_[y0:y1, x0:x1]

    lift = (0.16 if placement.label else 0.3) * placement.radius
    shift = -light.direction[:2] / light.direction[2] * lift
    shadow = ndimage.shift(alpha, (shift[1], shift[0]), order=1)
    shadow = 0.55 * ndimage.gaussian_filter(shadow, max(0.06 * placement.radius, 0.6))
    canvas[target] *= 1 - shadow[block][..., None]
    cover = alpha[block][..., None]
    canvas[target] = canvas[target] * (1 - cover) + color[block] * cover
    mask[target][alpha[block] >= 0.5] = placement.label


def _fill(placement: Placement, outline: Outline, left: int, top: int, side: int) -> npt.NDArray[np.bool_]:
    """The outline on the fine grid of the object's block."""
    raster = Image.new("1", (side, side))
    draw = ImageDraw.Draw(raster)
    cos, sin = np.cos(placement.angle), np.sin(placement.angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * placement.radius
    center = np.array([placement.x - left, placement.y - top])
    for value, polygons in ((1, outline.filled), (0, outline.holes)):
        for polygon in polygons:
            points = (polygon @ turn + center) * _SUPERSAMPLING
            draw.polygon([(float(px), float(py)) for px, py in points], fill=value)
    return np.asarray(raster)


def _average(values: Array) -> Array:
    """Mean over blocks of the fine grid: (s*H, s*W, ...) -> (H, W, ...)."""
    fine = _SUPERSAMPLING
    height, width = values.shape[0] // fine, values.shape[1] // fine
    means: Array = values.reshape(height, fine, width, fine, *values.shape[2:]).mean(axis=(1, 3))
    return means
