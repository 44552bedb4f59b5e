"""The image bank of SFC (arXiv 2401.11719): the newest crop of every class, drawn uniformly over classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Drawn:
    """Samples from the bank: images (M, 3, S, S), valid (M, S, S), tags (M, K)."""

    image: Tensor
    valid: Tensor
    tags: Tensor


class ImageBank(nn.Module):
    """One slot a class; each holds the latest training crop with that class, its valid mask and all its tags.

    The validity is kept as a mask of the crop instead of one map a class and pixel, a seventh of the published
    memory. The slots are part of the training state, so that a resumed run goes on with the same ones.

    Args:
        classes: Foreground classes K.
        size: Side of a crop in pixels.
    """

    images: Tensor
    valid: Tensor
    tags: Tensor
    filled: Tensor

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(classes, 3, size, size))
        self.register_buffer("valid", torch.zeros(classes, size, size, dtype=torch.bool))
        self.register_buffer("tags", torch.zeros(classes, classes))
        self.register_buffer("filled", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, image: Tensor, valid: Tensor, tags: Tensor) -> None:
        """Store a batch, in order: an image goes into the slot of each of its classes, later ones overwrite.

        Args:
            image: (N, 3, S, S).
            valid: bool (N, S, S).
            tags: (N, K), 1 where present; NaN, unknown, stays so.
        """
        present = tags == 1
        for number in range(len(image)):
            slots = present[number]
            self.images[slots] = image[number].to(self.images)
            self.valid[slots] = valid[number]
            self.tags[slots] = tags[number].to(self.tags)
            self.filled |= slots

    @torch.no_grad()
    def draw(self, count: int) -> Drawn:
        """Samples of slots drawn uniformly with replacement.

        The release draws empty slots too in its first iterations: black images without a class. Here only filled
        slots are drawn, and an empty bank gives no samples.

        Args:
            count: Samples wanted.
        """
        slots = self.filled.nonzero().flatten()
        chosen = slots[torch.randint(len(slots), (count,), device=slots.device)] if len(slots) else slots
        return Drawn(self.images[chosen], self.valid[chosen], self.tags[chosen])
