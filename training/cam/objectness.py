"""Where the object of a photograph is, before anything is learnt: class token's attention and the image's middle.

From a few images a classifier of images learns what happens to be in them, the carpet of three cats as well as the
cats. What an encoder's class token looks at, and that people put what they photograph into the middle, is known
before. What seeds chosen by both together bring: `benchmarks/few_images.py`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.cam.attention import attention_layers
from training.cam.head import depth_index
from wsss_deploy.networks.encoder import Encoder

#: Fraction of the depth; the class token of later blocks looks at the image as a whole.
DEPTH = 0.75


class Objectness:
    """Records, for each image that the encoder sees, how much its positions look like an object.

    Use as a context manager around forward passes of single images that reach block `index`, with `add` after each.

    Args:
        encoder: A plain ViT with a class token, see `is_known`.

    Attributes:
        index: Of the block, as timm counts.
        maps: One array (positions,) an image, row by row: mean 0 over the image; larger where an object is likelier.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.index = depth_index(encoder, DEPTH)
        self._layer: Any = attention_layers(encoder)[self.index]
        self._prefix = int(encoder.model.num_prefix_tokens)
        self._seen: Tensor | None = None
        self._hook: Any = None
        self.maps: list[NDArray[np.float32]] = []

    @staticmethod
    def is_known(encoder: Encoder) -> bool:
        """Whether the encoder has a class token whose attention over the positions of every block can be read off."""
        model: Any = encoder.model
        blocks = max(encoder.indices) + 1
        return bool(getattr(model, "has_class_token", False)) and len(attention_layers(encoder)) == blocks

    def __enter__(self) -> Self:
        self._hook = self._layer.register_forward_hook(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def add(self, size: tuple[int, int]) -> None:
        """Take up the image that was seen last.

        Args:
            size: Rows and columns of its positions.
        """
        assert self._seen is not None
        attention = np.log(self._seen.cpu().numpy().astype(np.float64) + 1e-9)
        self.maps.append((_standard(attention) + _standard(_middle(size))).astype(np.float32))
        self._seen = None

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens, attention = inputs[0], self._layer
        query, key, _ = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
        with torch.autocast(tokens.device.type, enabled=False):
            weights = (query.float() @ key.float().transpose(2, 3) * attention.scale).softmax(dim=-1)
        self._seen = weights[0, :, 0, self._prefix :].mean(dim=0)


def _middle(size: tuple[int, int]) -> NDArray[np.float64]:
    """Minus the squared distance from the middle, in units of the sides; (positions,)."""
    rows, columns = (((np.arange(count) + 0.5) / count - 0.5) ** 2 for count in size)
    return -(rows[:, None] + columns).reshape(-1)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0 and variance 1, or 0 where all are the same."""
    values = values - values.mean()
    deviation = values.std()
    return values / deviation if deviation > 1e-9 else np.zeros_like(values)
