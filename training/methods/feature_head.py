"""Heads on encoder maps that a method owns while it trains; none of them is saved with the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

_REDUCED = 64
_AUXILIARY = 256
_DROPOUT = 0.1


class FeatureConsistencyHead(nn.Module):
    """DFR's head (reconstruction after A2GNN): each map to 64 channels, raised to one size, fused by a 1x1 layer.

    Args:
        channels: Channels of each input map.
        width: Channels E of the output.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        # Encoder maps have not passed a norm, and a transformer's grow to any size; ours.
        self.norm = nn.ModuleList(LayerNorm2d(count) for count in channels)
        self.reduce = nn.ModuleList(nn.Conv2d(count, _REDUCED, 1) for count in channels)
        self.fuse = nn.Conv2d(len(channels) * _REDUCED, width, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The features g.

        Args:
            maps: (N, c, h, w) in the order of `channels`.
            size: Of the output.

        Returns:
            (N, E, *size).
        """
        levels = [
            resize(F.elu(reduce(norm(level))), size)
            for norm, reduce, level in zip(self.norm, self.reduce, maps, strict=True)
        ]
        fused: Tensor = F.elu(self.fuse(torch.cat(levels, dim=1)))
        return fused


class AuxiliaryHead(nn.Module):
    """The small head that is in use beside UperNet: 3x3 layer of 256 channels, then class logits.

    Args:
        channels: Of the input map.
        num_classes: Of the logits.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, _AUXILIARY, 3, padding=1, bias=False),
            LayerNorm2d(_AUXILIARY),
            nn.ReLU(),
            nn.Dropout2d(_DROPOUT),
            nn.Conv2d(_AUXILIARY, num_classes, 1),
        )

    def forward(self, level: Tensor) -> Tensor:
        """Logits (N, num_classes, h, w) of a map (N, c, h, w)."""
        logits: Tensor = self.layers(level)
        return logits


def plain_features(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps of unit length per pixel, side by side: deep features without a head, (N, sum of channels, *size)."""
    return torch.cat([resize(F.normalize(level.float(), dim=1), size) for level in maps], dim=1)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear up, area average down; (N, C, *size)."""
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
