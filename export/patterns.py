"""Images made by rule, for checks that need no files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Real images that are compared besides.
MOST_IMAGES = 8


def pattern_image(height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """A smooth colour field with stripes, sharp rectangles and noise: something of all that a photograph has.

    Args:
        height: In pixels.
        width: In pixels.
        seed: Of the generator; the same seed and size give the same image.

    Returns:
        uint8 (height, width, 3).
    """
    rng = np.random.default_rng([seed, height, width])
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 24)
    image = image + 30 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)[..., None]
    for _ in range(5):
        top, left = rng.integers(0, height), rng.integers(0, width)
        bottom, right = top + rng.integers(1, height // 2 + 2), left + rng.integers(1, width // 2 + 2)
        image[top:bottom, left:right] = rng.integers(0, 256, 3)
    image = image + rng.normal(0, 8, image.shape)
    noisy: npt.NDArray[np.float64] = np.clip(image, 0, 255)
    return noisy.astype(np.uint8)
