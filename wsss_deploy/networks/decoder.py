"""Decoders: encoder maps and the image to class logits at a quarter of the image's size.

Nothing here looks further than a few pixels or normalises over space, so a tile of a large image gives the same
result as the whole (up to the encoder's own context).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.errors import RecipeError

OUTPUT_STRIDE = 4


class LightDecoder(nn.Module):
    """Projections of all levels, summed, raised to stride 4 in learned steps, sharpened by a small image branch.

    A plain ViT has all its maps at stride 14 or 16, so its decoder does most of its work there, where pixels are
    few, and the two steps up stay narrow. The image branch sees borders that a patch has averaged away.

    Args:
        channels: Channels of each encoder map.
        reductions: Stride of each encoder map, in image pixels.
        width: Channels at the finest encoder map; half of them at stride 4.
        num_classes: Channels of the logits.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.finest = min(range(len(reductions)), key=lambda level: reductions[level])
        steps = max(0, math.ceil(math.log2(reductions[self.finest] / OUTPUT_STRIDE)))
        half = width // 2
        self.project = nn.ModuleList(
            nn.Sequential(LayerNorm2d(count), nn.Conv2d(count, width, 1)) for count in channels
        )
        self.fuse = MixBlock(width)
        self.rise = nn.ModuleList(MixBlock(width) for _ in range(steps - 1))
        # Fixed widths and no norm behind the first layer: over a few channels it would leave little but signs.
        self.detail = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            LayerNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, half, 1),
        )
        self.narrow = nn.Conv2d(width, half, 1)
        self.mix = MixBlock(half)
        self.classify = nn.Sequential(LayerNorm2d(half), nn.Conv2d(half, num_classes, 1))

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Class logits.

        Args:
            image: Normalised image (N, 3, H, W); H and W multiples of the network's stride.
            features: Encoder maps (N, c, h, w), in the order of `channels`.

        Returns:
            Logits (N, num_classes, H / 4, W / 4).
        """
        size = features[self.finest].shape[-2:]
        projected = [layer(level) for layer, level in zip(self.project, features, strict=True)]
        x = projected[self.finest]
        for index, level in enumerate(projected):
            if index != self.finest:
                x = x + (level if level.shape[-2:] == size else _resize(level, size))
        x = self.fuse(x)
        for block in self.rise:
            x = block(_resize(x, (2 * x.shape[-2], 2 * x.shape[-1])))
        detail = self.detail(image)
        x = _resize(self.narrow(x), detail.shape[-2:]) + detail
        logits: Tensor = self.classify(self.mix(x))
        return logits


class MixBlock(nn.Module):
    """Residual block: 3x3 depthwise convolution, per-pixel LayerNorm, GELU, 1x1 convolution; (N, C, H, W) kept.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            LayerNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix each pixel with its eight neighbours; shape (N, C, H, W) in and out."""
        mixed: Tensor = x + self.body(x)
        return mixed


DECODERS: dict[str, type[LightDecoder]] = {"light": LightDecoder}


def build_decoder(
    name: str, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int
) -> LightDecoder:
    """The decoder of that name.

    Args:
        name: A key of `DECODERS`.
        channels: Channels of each encoder map.
        reductions: Stride of each encoder map.
        width: Channels inside the decoder.
        num_classes: Channels of the logits.

    Raises:
        RecipeError: There is no such decoder.
    """
    if name not in DECODERS:
        raise RecipeError([f"decoder '{name}' is not known; choose one of: {', '.join(DECODERS)}"])
    return DECODERS[name](channels, reductions, width, num_classes)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
