"""What every method has: a batch and the network in, weighted loss terms out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.losses import class_weights_from_counts
from training.methods.settings import ClassWeights
from wsss_deploy.card import Preprocessing
from wsss_deploy.errors import RecipeError
from wsss_deploy.networks import SegmentationNetwork
from wsss_deploy.networks.encoder import Encoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Attributes:
        image: Normalised as the encoder expects, float (N, 3, S, S).
        labels: int64 (N, S, S); 255 is unlabelled.
        valid: bool (N, S, S); True inside the image, False in the padding of a crop.
        tags: float32 (N, K), 1 where the class is in the image, 0 where not, NaN where unknown.
        labelled: bool (N, K), the classes of which the whole image, not only the crop, holds a label; the background,
            where the data set has one, with any label.
    """

    image: Tensor
    labels: Tensor
    valid: Tensor
    tags: Tensor
    labelled: Tensor


@dataclass(frozen=True)
class MethodContext:
    """What a method may need to know of the run.

    Attributes:
        num_classes: Channels of the logits.
        preprocessing: Normalisation of `Batch.image`.
        class_counts: Labelled pixels per class over the training split, where counted.
        encoder: Of the network, for methods whose heads must fit its maps.
        decoder: Of the network, for the same.
        class_maps: What the classifier of a stage before says of images (N, 3, H, W) and tags (N, C): maps
            (N, any number, any size), for methods that compare positions by it.
    """

    num_classes: int
    preprocessing: Preprocessing
    class_counts: tuple[int, ...] | None = None
    encoder: Encoder | None = None
    decoder: nn.Module | None = None
    class_maps: Callable[[Tensor, Tensor], Tensor] | None = None

    def class_weights(self, rule: ClassWeights) -> Tensor | None:
        """Weights (C,) of the cross-entropy by the recipe's rule; None is equal weights.

        Raises:
            RecipeError: The rule needs counts that nobody took, or of another number of classes.
        """
        if rule == "off":
            return None
        if self.class_counts is None or len(self.class_counts) != self.num_classes:
            found = "none" if self.class_counts is None else f"{len(self.class_counts)}"
            raise RecipeError(
                [f"method.class_weights: 'counts' needs labelled pixels of {self.num_classes} classes, found {found}"]
            )
        return class_weights_from_counts(self.class_counts)


class Method(nn.Module, ABC):
    """How losses combine and when they switch on.

    A method may own parameters; they are optimised and checkpointed with the network and dropped at inference.

    Attributes:
        needs_teacher: Whether the method asks for the moving average of the network.
        teacher_option: Key of the recipe that makes it ask.
    """

    needs_teacher = False
    teacher_option = "method.teacher"
    # In a tuple, so that it is no submodule: the trainer updates and checkpoints it, not this method.
    _teacher: tuple[SegmentationNetwork, ...] = ()

    def set_teacher(self, network: SegmentationNetwork | None) -> None:
        """Take the moving average of the network, which the trainer keeps up to date in place.

        Args:
            network: None where the recipe keeps no average.

        Raises:
            RecipeError: The method needs an average and there is none.
        """
        if network is None:
            if self.needs_teacher:
                raise missing_average(self.teacher_option)
            return
        if self.needs_teacher:
            self._teacher = (network.eval(),)

    @property
    def teacher(self) -> SegmentationNetwork | None:
        """The moving average of the network, in evaluation mode, where it was asked for."""
        return self._teacher[0] if self._teacher else None

    @abstractmethod
    def forward(self, network: SegmentationNetwork, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Weighted loss terms.

        Args:
            network: Image (N, 3, S, S) to logits (N, C, S / 4, S / 4).
            batch: One training batch.
            progress: Part of the training that is done, in [0, 1).

        Returns:
            Scalars by name, never empty; training minimises their sum.
        """


def start_reached(progress: float, start: float) -> bool:
    """Whether a term that starts after the fraction `start` of the training is on; 0 starts at once."""
    return start == 0 or progress > start


def to_units(image: Tensor, preprocessing: Preprocessing, mean: Tensor, std: Tensor) -> Tensor:
    """Re-normalise an image from the encoder's units to others.

    Args:
        image: (N, 3, H, W), (value - preprocessing.mean) / preprocessing.std, values in [0, 1].
        preprocessing: The encoder's normalisation.
        mean: Of the wanted units, (3,).
        std: Of the wanted units, (3,).
    """
    old_mean, old_std = (torch.tensor(v, device=image.device) for v in (preprocessing.mean, preprocessing.std))
    scale, offset = old_std / std, (old_mean - mean) / std
    return image * scale.view(1, 3, 1, 1) + offset.view(1, 3, 1, 1)


def missing_average(option: str) -> RecipeError:
    """What to say where the recipe's `option` asks for a teacher and `optimisation.ema` is 0."""
    return RecipeError([f"{option}: needs a moving average; set optimisation.ema above 0, say 0.99, or {option}=null"])
