"""Classification on any encoder: 1x1 classifiers on maps of chosen depths, and their class score maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from training.cam.maps import multi_scale_cams, pool_scores
from wsss_deploy.networks.encoder import Encoder

_BEYOND = 10_000


def depth_index(encoder: Encoder, depth: float) -> int:
    """Index, as timm counts, of the block (plain ViT) or stage (else) that ends at a fraction of the depth.

    Args:
        encoder: Any encoder; its own maps go up to its last block or stage.
        depth: In (0, 1]; 1 is the last, 10 / 12 the tenth of twelve.
    """
    total = max(encoder.indices) + 1
    return min(total, max(1, math.ceil(depth * total - 1e-6))) - 1


def freeze(encoder: Encoder, share: float) -> None:
    """Keep the first layers from learning, and every batch norm at the statistics that it came with.

    Batches of images from which little is to be learnt are too small to make statistics of.

    Args:
        encoder: Changed in place.
        share: Part of its layers (a ViT's blocks, a CNN's) that stay, in [0, 1]; with any, the stem stays as well.
    """
    model: Any = encoder.model
    layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    # timm numbers what follows the last block far beyond it.
    last = max((layer for layer in layer_of.values() if layer < _BEYOND), default=0)
    parameters = dict(model.named_parameters())
    for name, layer in layer_of.items():
        if share and layer <= round(share * last):
            parameters[name].requires_grad_(False)
    if share:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Whatever mode the network is put into.
                module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    module.eval()


def encode(encoder: Encoder, image: Tensor, indices: Sequence[int]) -> dict[int, Tensor]:
    """Encoder maps of any blocks or stages in one pass.

    Args:
        encoder: Any encoder.
        image: Normalised (N, 3, H, W).
        indices: timm's indices, in any order.

    Returns:
        Maps (N, c, h, w) by index.
    """
    wanted = sorted(set(indices))
    model: Any = encoder.model
    maps = model.forward_intermediates(image, indices=wanted, stop_early=True, intermediates_only=True)
    return dict(zip(wanted, maps, strict=True))


class CamHead(nn.Module):
    """A 1x1 classifier on each chosen map; its weights on normalised features are the CAM.

    Maps of different depths and encoders differ in scale; each position's feature is normalised first, so that one
    learning rate suits all. Biases, which take up how common a class is, take part in scores but not in CAMs.

    Args:
        encoder: Tells the channels; not kept.
        classes: Foreground classes K.
        depths: Fractions of the encoder's depth that get a classifier.
        pooling: Fraction of a map's cells whose mean is the image's score: 1 average, 0 maximum.
    """

    def __init__(self, encoder: Encoder, classes: int, depths: Sequence[float], pooling: float) -> None:
        super().__init__()
        self.indices = sorted({depth_index(encoder, depth) for depth in depths})
        self.pooling = pooling
        with torch.no_grad():
            training = encoder.training
            side = 2 * encoder.stride
            probe = torch.zeros(1, 3, side, side, device=next(encoder.parameters()).device)
            maps = encode(encoder.eval(), probe, self.indices)
            encoder.train(training)
        self.classify = nn.ModuleList(
            nn.Sequential(LayerNorm2d(maps[index].shape[1]), nn.Conv2d(maps[index].shape[1], classes, 1))
            for index in self.indices
        )
        layer: Any
        for layer in self.classify:
            # From nothing: a random start would have to be unlearned in the few steps of a short run.
            nn.init.zeros_(layer[1].weight)
            nn.init.zeros_(layer[1].bias)

    def forward(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """Maps of class scores (N, K, h, w) by index, from encoder maps by index."""
        return {index: layer(maps[index]) for index, layer in zip(self.indices, self.classify, strict=True)}

    def activations(self, encoder_map: Tensor, index: int) -> Tensor:
        """What a CAM is made of: class scores without the biases of classifier and norm.

        Args:
            encoder_map: (N, c, h, w) of this index.
            index: One of those that have a classifier.

        Returns:
            (N, K, h, w), of any sign.
        """
        pair: Any = self.classify[self.indices.index(index)]
        normalise, classifier = pair
        return F.conv2d(normalise(encoder_map) - normalise.bias[:, None, None], classifier.weight)

    def pooled(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Image scores (N, K) of one map.

        Args:
            scores: (N, K, h, w).
            valid: bool (N, H, W).
        """
        size = (scores.shape[-2], scores.shape[-1])
        inside = F.adaptive_avg_pool2d(valid[:, None].float(), size)[:, 0]
        return pool_scores(scores.float(), self.pooling, inside)

    def cams(
        self,
        encoder: Encoder,
        image: Tensor,
        depth: float,
        scales: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """CAMs over scales and flips.

        Args:
            encoder: In evaluation mode.
            image: Normalised (N, 3, H, W).
            depth: Fraction of the encoder's depth.
            scales: Factors of the image's size.
            size: Of the result; None is the image's.

        Returns:
            (N, K, *size) in [0, 1].
        """
        index = self.cam_index(encoder, depth)

        def scores(view: Tensor) -> Tensor:
            return self.activations(encode(encoder, view, [index])[index], index).float()

        return multi_scale_cams(scores, image, scales, encoder.stride, size)

    def cam_index(self, encoder: Encoder, depth: float) -> int:
        """The index nearest to a depth among those with a classifier."""
        wanted = depth_index(encoder, depth)
        return min(self.indices, key=lambda index: abs(index - wanted))
