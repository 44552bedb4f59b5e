"""Attention of an encoder's last blocks, recorded while it runs (AFA, arXiv 2203.02664)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from timm.layers import Attention
from timm.models import pvt_v2
from torch import Tensor, nn

from wsss_deploy.errors import RecipeError
from wsss_deploy.networks.encoder import Encoder


class AttentionTap:
    """Records queries and keys of the last attention layers that see one token per position.

    Known are timm's layer of plain ViTs (class and register tokens are dropped) and PVTv2's without reduction, in its
    last stage; others add rotations, biases or windows that queries and keys do not show. Use as a context manager
    around one forward pass, with gradient or without.

    Args:
        encoder: Its `model` is hooked while the context lasts.
        layers: How many of the last such layers are recorded.

    Raises:
        RecipeError: The encoder has none.
    """

    def __init__(self, encoder: Encoder, layers: int = 2) -> None:
        found = attention_layers(encoder)
        if not found:
            raise RecipeError(
                [
                    f"encoder '{encoder.name}' has no attention over all positions from which affinity could be read; "
                    "use a plain ViT or PVTv2, or set the affinity's weight to 0"
                ]
            )
        self._layers = found[-layers:]
        self._prefix = int(getattr(encoder.model, "num_prefix_tokens", 0))
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._pairs.clear()
        self._hooks = [layer.register_forward_hook(self._record, with_kwargs=False) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def scale(self) -> float:
        """The factor that attention applies to `logits` before its softmax."""
        layer: Any = self._layers[0]
        return float(layer.scale)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of each layer, (N, heads, n, d) each, n positions row by row."""
        return list(self._pairs)

    def logits(self) -> Tensor:
        """Products of both before scale and softmax, heads of all layers side by side: float32 (N, heads, n, n)."""
        with torch.autocast(self._pairs[0][0].device.type, enabled=False):
            return torch.cat([query.float() @ key.float().transpose(2, 3) for query, key in self._pairs], dim=1)

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = inputs[0]
        attention: Any = layer
        heads: int = attention.num_heads
        if hasattr(attention, "qkv"):
            query, key, _ = attention.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            query = attention.q(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
            key = attention.kv(tokens).unflatten(2, (2, heads, -1))[:, :, 0].transpose(1, 2)
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                query, key = (
                    getattr(attention, name)(part) if name[0] == kind else part
                    for kind, part in (("q", query), ("k", key))
                )
        self._pairs.append((query[:, :, self._prefix :], key[:, :, self._prefix :]))


def attention_layers(encoder: Encoder) -> list[nn.Module]:
    """Attention layers whose maps are square over positions, in the order of depth."""
    return [module for module in encoder.model.modules() if _is_known(module)]


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, pvt_v2.Attention):
        return layer.sr is None  # without reduction keys are as many as queries
    return type(layer) is Attention


def count_heads(encoder: Encoder, layers: int = 2) -> int:
    """Heads of the last layers together; see `AttentionTap`."""
    found: Sequence[Any] = attention_layers(encoder)[-layers:]
    return sum(int(layer.num_heads) for layer in found)


class AffinityHead(nn.Module):
    """Attention logits of all heads to an affinity in (0, 1): symmetrised, one 1x1 convolution, sigmoid.

    AFA adds the transpose first; the released TSCD leaves that out. Affinity is symmetric by its labels, so it is
    kept here.

    Args:
        heads: Maps that go in.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(heads, 1, 1)
        nn.init.kaiming_normal_(self.mix.weight, a=math.sqrt(5), mode="fan_out")

    def forward(self, logits: Tensor) -> Tensor:
        """Affinity (N, n, n) from logits (N, heads, n, n); float32 at least."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            affinity: Tensor = self.mix(logits + logits.transpose(2, 3))[:, 0].sigmoid()
            return affinity
