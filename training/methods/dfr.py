"""DFR, the Dynamic Feature Regularized loss (arXiv 2108.01296): a reconstruction, see docs/sparse_labels.md.

Sparse labels, spread by a Gated CRF loss whose kernel also looks at deep features; a feature consistency head makes
these features trustworthy, learning from pairs of labelled and confidently predicted pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import (
    Kernel,
    block_labels,
    dense_pair_energy,
    feature_consistency_loss,
    feature_smoothness_loss,
    gated_crf_loss,
    pair_targets,
    unlabelled_blocks,
)
from training.methods.base import Batch, MethodContext, start_reached
from training.methods.feature_head import AuxiliaryHead, FeatureConsistencyHead, plain_features, resize
from training.methods.gated_crf import at_size
from training.methods.settings import DFRSettings
from training.methods.sparse import SparseMethod, whole_cells
from wsss_deploy.card import IGNORE_INDEX
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import SegmentationNetwork
from wsss_deploy.networks.upernet import UperNetDecoder
from wsss_deploy.pairwise import EnergyParameters, EnergyTerm, energy

Size = tuple[int, int]


class DFR(SparseMethod):
    """Partial cross-entropy, regularised loss and the head's loss; the head is dropped at inference.

    Args:
        settings: From the recipe.
        context: Of the run; its encoder (and decoder) tell the head's channels.

    Raises:
        RecipeError: Features are asked of a decoder that fuses none.
    """

    def __init__(self, settings: DFRSettings, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.settings = settings
        if context.encoder is None:
            raise RecipeError(["method.name: 'dfr' puts a head on the encoder; give build_method the network's"])
        channels: Sequence[int] = context.encoder.channels
        auxiliary = channels[-2:][0]
        if settings.features == "last":
            channels = channels[-1:]
        elif settings.features == "decoder":
            if not isinstance(context.decoder, UperNetDecoder):
                raise RecipeError(["method.features: 'decoder' needs a decoder that fuses a map; set decoder: upernet"])
            channels = (context.decoder.width,)
        self.head = FeatureConsistencyHead(channels, settings.head_width) if settings.head_weight else None
        self.auxiliary = AuxiliaryHead(auxiliary, context.num_classes) if settings.auxiliary_weight else None

    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms `partial_ce`, `dfr`, `consistency`, `smoothness` and `auxiliary`, as far as they are on."""
        settings = self.settings
        levels = network.forward_features(batch.image)
        if isinstance(network.decoder, UperNetDecoder):
            fused = network.decoder.fuse(levels)
            logits = network.decoder.project(batch.image, fused)
            maps = {"decoder": [fused], "last": levels[-1:], "stages": levels}[settings.features]
        else:
            logits = network.decoder(batch.image, levels)
            maps = levels[-1:] if settings.features == "last" else levels
        terms = self.sparse_terms(logits, batch, progress)
        if self.auxiliary is not None:
            terms["auxiliary"] = settings.auxiliary_weight * self.cross_entropy(
                self.auxiliary(levels[-2:][0]), batch.labels
            )
        height, width = batch.image.shape[-2:]
        size = (height // settings.stride, width // settings.stride)
        probabilities = at_size(logits, size)
        deep = start_reached(progress, settings.deep_start)
        features = self._features(maps, size)
        if self.head is not None:
            terms |= self._head_terms(features, probabilities, batch, deep)
        if settings.weight and start_reached(progress, settings.start):
            kernels = self._kernels(deep)
            if kernels:
                terms["dfr"] = settings.weight * self._regularised(probabilities, features, kernels, batch)
        return terms

    def _features(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        if self.settings.detach:
            maps = [level.detach() for level in maps]
        return plain_features(maps, size) if self.head is None else self.head(maps, size)

    def _head_terms(self, features: Tensor, probabilities: Tensor, batch: Batch, deep: bool) -> dict[str, Tensor]:
        settings, size = self.settings, (features.shape[-2], features.shape[-1])
        inside = whole_cells(batch.valid, size)
        labels, free = block_labels(batch.labels, size), unlabelled_blocks(batch.labels, size)
        if settings.pairs == "predictions":
            labels, free = torch.full_like(labels, IGNORE_INDEX), torch.ones_like(free)
        predicted = deep and settings.pairs != "labels"
        targets = pair_targets(labels, probabilities if predicted else None, settings.threshold, free)
        targets = targets.masked_fill(~inside, IGNORE_INDEX)
        loss = feature_consistency_loss(features, targets, settings.head_radius, distance=settings.distance)
        terms = {"consistency": settings.head_weight * loss.total}
        if settings.smooth_weight:
            rgb = F.adaptive_avg_pool2d(self.imagenet_rgb(batch), size)
            kernel = Kernel(1.0, {"xy": settings.xy, "rgb": settings.rgb})
            smooth = feature_smoothness_loss(features, rgb, (kernel,), settings.head_radius, inside)
            terms["smoothness"] = settings.smooth_weight * smooth
        return terms

    def _kernels(self, deep: bool) -> tuple[Kernel, ...]:
        """Descriptors of the kernel (dfr.md 3.3); `xy`, `rgb` and the unit features `feat` are its modalities."""
        settings = self.settings
        shallow = {"xy": settings.xy, "rgb": settings.rgb}
        if settings.kernel == "product":
            linked = deep and settings.deep_weight > 0
            return (Kernel(1.0, shallow | ({"feat": settings.feature} if linked else {})),)
        kernels = []
        if settings.shallow_weight:
            kernels.append(Kernel(settings.shallow_weight, shallow))
        if settings.deep_weight and deep:
            kernels.append(Kernel(settings.deep_weight, {"xy": settings.xy, "feat": settings.feature}))
        return tuple(kernels)

    def _regularised(
        self, probabilities: Tensor, features: Tensor, kernels: tuple[Kernel, ...], batch: Batch
    ) -> Tensor:
        settings, size = self.settings, (probabilities.shape[-2], probabilities.shape[-1])
        unit = F.normalize(features.float(), dim=1, eps=1e-12)
        modalities = {
            "rgb": F.adaptive_avg_pool2d(self.imagenet_rgb(batch), size),
            "feat": unit if settings.kernel_gradient else unit.detach(),
        }
        valid = whole_cells(batch.valid, size)[:, None].to(probabilities)
        receivers = torch.ones_like(valid)
        if settings.gate == "confidence":
            # Without the padding, which receives nothing and would only be counted.
            receivers = (1 - probabilities.detach().max(dim=1, keepdim=True).values) * valid
        if settings.dense:
            small = _at_most(size, settings.dense)
            modalities = {name: resize(maps, small) for name, maps in modalities.items()}
            sources = (resize(valid, small) >= 1).to(probabilities)
            # Positions are in pixels of the map on which the loss would act without this.
            shrunk = tuple(
                Kernel(k.weight, {n: s * small[0] / size[0] if n == "xy" else s for n, s in k.sigmas.items()})
                for k in kernels
            )
            receivers = resize(receivers, small)
            total = dense_pair_energy(resize(probabilities, small), shrunk, modalities, sources, receivers)
            # As in the window, 1 / sum(v) (dfr.md 3.4).
            return total / (sources if settings.gate == "valid" else receivers).sum().clamp(min=1)
        if settings.gate == "valid":
            loss: Tensor = gated_crf_loss(
                probabilities,
                kernels,
                modalities,
                settings.radius,
                mask_src=valid,
                kernel_gradient=settings.kernel_gradient,
            )
            return loss
        scaled = [
            torch.cat([modalities[name] / sigma for name, sigma in kernel.sigmas.items() if name != "xy"], dim=1)
            for kernel in kernels
        ]
        terms = tuple(EnergyTerm(weight=kernel.weight, xy_sigma=kernel.sigmas["xy"]) for kernel in kernels)
        total = energy(
            probabilities,
            scaled,
            EnergyParameters(radius=settings.radius, terms=terms),
            source=valid,
            destination=receivers,
        )
        return total / receivers.sum().clamp(min=1)


def _at_most(size: Size, side: int) -> Size:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
