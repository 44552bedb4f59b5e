"""Decoders: encoder maps and the image to class logits at a quarter of the image's size.

Nothing in this file looks further than a few pixels or normalises over space, so a tile of a large image gives the
same result as the whole (up to the encoder's own context).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_deploy.activation import FLOOR
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks.upernet import UperNetDecoder

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
        self.detail = _image_branch(half)
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
        x = self.fuse(_sum_of_levels(self.project, features, self.finest))
        for block in self.rise:
            x = block(_resize(x, (2 * x.shape[-2], 2 * x.shape[-1])))
        detail = self.detail(image)
        x = _resize(self.narrow(x), detail.shape[-2:]) + detail
        logits: Tensor = self.classify(self.mix(x))
        return logits


class MLPDecoder(nn.Module):
    """A per-pixel MLP over all levels, and a fine correction at stride 4 that starts at zero.

    The MLP is SegFormer's head (arXiv 2105.15203, section 3.2): projections of all levels, summed at the finest one,
    a nonlinearity, class logits. With a pretrained encoder and few iterations it beats decoders that must learn to
    raise features first (docs/results.md). What patches have averaged away comes back through the correction, which
    sees the image at stride 4; it begins as nothing, so it can only be learned where it helps.

    Args:
        channels: Channels of each encoder map.
        reductions: Stride of each encoder map, in image pixels.
        width: Hidden channels of the MLP; the correction has a quarter of them, at least 16.
        num_classes: Channels of the logits.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.finest = min(range(len(reductions)), key=lambda level: reductions[level])
        fine = max(16, width // 4)
        self.project = nn.ModuleList(
            nn.Sequential(LayerNorm2d(count), nn.Conv2d(count, width, 1)) for count in channels
        )
        self.detail = _image_branch(fine)
        self.narrow = nn.Conv2d(width, fine, 1)
        self.mix = nn.Sequential(MixBlock(fine), LayerNorm2d(fine))
        correction = nn.Conv2d(fine, num_classes, 1)
        for parameter in correction.parameters():
            nn.init.zeros_(parameter)
        self.classify = nn.ModuleDict({"coarse": nn.Conv2d(width, num_classes, 1), "fine": correction})

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Class logits.

        Args:
            image: Normalised image (N, 3, H, W); H and W multiples of the network's stride.
            features: Encoder maps (N, c, h, w), in the order of `channels`.

        Returns:
            Logits (N, num_classes, H / 4, W / 4).
        """
        hidden = F.gelu(_sum_of_levels(self.project, features, self.finest))
        detail = self.detail(image)
        size = detail.shape[-2:]
        fine = self.mix(_resize(self.narrow(hidden), size) + detail)
        logits: Tensor = _resize(self.classify["coarse"](hidden), size) + self.classify["fine"](fine)
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


class CamDecoder(nn.Module):
    """Class activation maps of a classifier on the encoder's last map, as logits; not trained, see `training/cam`.

    The logit of class k is log(max(a_k, 0) + `FLOOR`) and that of class 0 is 0, where a_k is the classifier's weight on
    the feature, without its biases (CAM, arXiv 1512.04150, equation 3). `wsss_deploy.activation.activation_maps` has
    the maps back from the softmax scores.

    Args:
        channels: Channels of each encoder map.
        reductions: Stride of each encoder map, in image pixels.
        width: Not used.
        num_classes: Channels of the logits, with the background.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.normalise: nn.Module = LayerNorm2d(channels[-1])
        self.classify = nn.Conv2d(channels[-1], num_classes - 1, 1, bias=False)

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Logits (N, num_classes, H / 4, W / 4); arguments as for the other decoders."""
        maps: Tensor = self.classify(self.normalise(features[-1])).relu()
        size = (image.shape[-2] // OUTPUT_STRIDE, image.shape[-1] // OUTPUT_STRIDE)
        logits = (_resize(maps, size) + FLOOR).log()
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


class PlainCamDecoder(CamDecoder):
    """The same for a classifier on features that are not normalised first (SFC, arXiv 2401.11719)."""

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__(channels, reductions, width, num_classes)
        self.normalise = nn.Identity()


Decoder = LightDecoder | MLPDecoder | UperNetDecoder | CamDecoder

DECODERS: dict[str, type[Decoder]] = {"mlp": MLPDecoder, "light": LightDecoder, "upernet": UperNetDecoder}
# What cards may name and recipes may not: there is nothing in them to be learned.
_MAPS: dict[str, type[Decoder]] = {"cam": CamDecoder, "cam-plain": PlainCamDecoder}


def build_decoder(
    name: str, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int
) -> Decoder:
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
    if name in _MAPS:
        return _MAPS[name](channels, reductions, width, num_classes)
    if name not in DECODERS:
        raise RecipeError([f"decoder '{name}' is not known; choose one of: {', '.join(DECODERS)}"])
    return DECODERS[name](channels, reductions, width, num_classes)


def _image_branch(width: int) -> nn.Sequential:
    """Normalised image (N, 3, H, W) to (N, width, H / 4, W / 4)."""
    # Fixed widths and no norm behind the first layer: over a few channels it would leave little but signs.
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        LayerNorm2d(32),
        nn.GELU(),
        nn.Conv2d(32, width, 1),
    )


def _sum_of_levels(project: nn.ModuleList, features: Sequence[Tensor], finest: int) -> Tensor:
    """Projected levels, brought to the finest one's size and added: (N, width, h, w)."""
    size = features[finest].shape[-2:]
    total: Tensor = project[finest](features[finest])
    for index, level in enumerate(features):
        if index != finest:
            projected = project[index](level)
            total = total + (projected if projected.shape[-2:] == size else _resize(projected, size))
    return total


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
