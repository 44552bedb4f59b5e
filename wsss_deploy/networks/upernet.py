"""UperNet's decoder: pyramid pooling on the coarsest level, a feature pyramid over all of them.

Xiao, Liu, Zhou, Jiang, Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221, section
3.1; the form without the other tasks' heads, as it is in use with Swin (arXiv 2103.14030). In place of its batch norms
there are per-pixel LayerNorms, so that small batches train and an image's result does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SCALES = (1, 2, 3, 6)
_DROPOUT = 0.1


class UperNetDecoder(nn.Module):
    """Pyramid pooling and a top-down feature pyramid, fused at the finest level.

    Pyramid pooling sees the whole image, so that tiles of a large image do not give what the whole gives.

    Args:
        channels: Channels of each encoder map.
        reductions: Not used; levels are brought to the sizes that they have, the finest comes first.
        width: Channels of every level (512 in use with Swin).
        num_classes: Channels of the logits.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.width = width
        self.lateral = nn.ModuleList(_block(count, width, 1) for count in channels[:-1])
        self.smooth = nn.ModuleList(_block(width, width, 3) for _ in channels[:-1])
        self.pools = nn.ModuleList(_block(channels[-1], width, 1) for _ in POOL_SCALES)
        self.bottleneck = _block(channels[-1] + len(POOL_SCALES) * width, width, 3)
        self.combine = _block(len(channels) * width, width, 3)
        self.classify = nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(width, num_classes, 1))

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """The map of which the logits are a projection.

        Args:
            features: Encoder maps (N, c, h, w), fine to coarse.

        Returns:
            (N, width, h, w) at the finest encoder map's size.
        """
        levels = [project(level) for project, level in zip(self.lateral, features[:-1], strict=True)]
        levels.append(self._pyramid_pooling(features[-1]))
        for index in range(len(levels) - 1, 0, -1):
            levels[index - 1] = levels[index - 1] + _resize(levels[index], levels[index - 1].shape[-2:])
        levels[:-1] = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        fused: Tensor = self.combine(torch.cat([levels[0], *(_resize(level, size) for level in levels[1:])], dim=1))
        return fused

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Class logits.

        Args:
            image: Normalised image (N, 3, H, W); only its size is used.
            features: Encoder maps (N, c, h, w), in the order of `channels`.

        Returns:
            Logits (N, num_classes, H / 4, W / 4).
        """
        return self.project(image, self.fuse(features))

    def project(self, image: Tensor, fused: Tensor) -> Tensor:
        """Logits (N, num_classes, H / 4, W / 4) of what `fuse` gave."""
        logits: Tensor = self.classify(fused)
        return _resize(logits, (image.shape[-2] // 4, image.shape[-1] // 4))

    def _pyramid_pooling(self, coarsest: Tensor) -> Tensor:
        size = coarsest.shape[-2:]
        pooled = [
            _resize(block(adaptive_average(coarsest, scale)), size)
            for block, scale in zip(self.pools, POOL_SCALES, strict=True)
        ]
        out: Tensor = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        return out


def adaptive_average(maps: Tensor, side: int) -> Tensor:
    """`F.adaptive_avg_pool2d(maps, side)` as two matrix products.

    ONNX has no adaptive pooling, and torch's export of it fixes the input's size. The bin averages of a column are a
    (side, H) matrix that arises from an index range, so that H and W stay symbols in the graph.

    Args:
        maps: (N, C, H, W).
        side: Bins along either axis; they overlap where it does not divide the size, or exceeds it.

    Returns:
        (N, C, side, side).
    """
    down, along = (_bins(maps.shape[axis], side, maps) for axis in (-2, -1))
    averages: Tensor = down @ maps @ along.transpose(0, 1)
    return averages


def _bins(size: int, side: int, like: Tensor) -> Tensor:
    """Averages over [floor(k size / side), ceil((k + 1) size / side)) for k < side: (side, size)."""
    index = torch.arange(size, device=like.device)
    bins = torch.arange(side, device=like.device)[:, None]
    start = torch.div(bins * size, side, rounding_mode="floor")
    end = torch.div((bins + 1) * size + (side - 1), side, rounding_mode="floor")
    inside = ((index >= start) & (index < end)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _block(channels: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, per-pixel norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), LayerNorm2d(width), nn.ReLU()
    )


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
