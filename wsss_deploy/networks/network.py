"""The network: encoder and decoder, and how a card becomes one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wsss_deploy.card import Architecture, ModelCard
from wsss_deploy.errors import ArtifactError, WsssError
from wsss_deploy.networks.decoder import build_decoder
from wsss_deploy.networks.encoder import Encoder
from wsss_deploy.networks.weights import load_encoder_weights, load_network_weights, read_weights

#: Bytes of tables that a network computes by itself (positions, windows) and no file holds.
MOST_TABLES = 2**29


class SegmentationNetwork(nn.Module):
    """Encoder and decoder; normalised images in, class logits at a quarter of their size out.

    Args:
        encoder: Gives the feature maps.
        decoder: Module called with (image, feature maps).

    Attributes:
        stride: Height and width of an image must be multiples of this many pixels.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.stride = encoder.stride

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """The encoder's maps.

        Args:
            image: Normalised (N, 3, H, W).

        Returns:
            Maps (N, c, h, w), fine to coarse.
        """
        features: list[Tensor] = self.encoder(image)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Class logits.

        Args:
            image: Normalised (N, 3, H, W); H and W multiples of `stride`.

        Returns:
            Logits (N, C, H / 4, W / 4).

        Raises:
            ValueError: H or W is no multiple of `stride`.
        """
        height, width = image.shape[-2:]
        # While exporting, sizes are symbols and a question about them would become a limit of the graph.
        if not torch.compiler.is_exporting() and (height % self.stride or width % self.stride):
            high, wide = (-(-side // self.stride) * self.stride for side in (height, width))
            raise ValueError(f"image is {height} x {width}, not multiples of {self.stride}; pad it to {high} x {wide}")
        logits: Tensor = self.decoder(image, self.forward_features(image))
        return logits


def build_network(
    architecture: Architecture,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] = "none",
    drop_path: float = 0.0,
) -> SegmentationNetwork:
    """The network of an architecture.

    Args:
        architecture: Encoder, decoder and their options.
        num_classes: Channels of the logits.
        weights: Where the encoder starts: "none" (random), "timm" (downloads timm's weights), or the path of a
            .safetensors, .pt or .pth file with the encoder's tensors. A `model.pt` of ours starts the whole network;
            its last layer is left out where the number of classes differs.
        drop_path: Stochastic depth rate of the encoder while it trains.

    Raises:
        RecipeError: No such encoder or decoder, or options that they do not take.
        TrainingError: The weights cannot be had or do not fit.
    """
    encoder = Encoder(architecture.encoder, architecture.encoder_options, drop_path)
    ours = None
    if str(weights) != "none":
        state = read_weights(weights, encoder)
        if any(name.startswith("decoder.") for name in state):
            ours = state
        else:
            load_encoder_weights(encoder, state, str(weights))
    encoder.prune()
    decoder = build_decoder(
        architecture.decoder, encoder.channels, encoder.reductions, architecture.decoder_width, num_classes
    )
    network = SegmentationNetwork(encoder, decoder)
    if ours is not None:
        load_network_weights(network, ours, str(weights))
    return network


def restore_network(card: ModelCard, state_dict: Mapping[str, Tensor], source: str) -> SegmentationNetwork:
    """The network of a model file, in evaluation mode.

    Args:
        card: The file's card.
        state_dict: The file's tensors.
        source: The file's name, for errors.

    Raises:
        ArtifactError: The tensors do not fit the card's architecture; what differs is named. Or there is no memory for
            the network.
        RecipeError: The installed timm has no such encoder.
    """
    try:
        # The structure alone first: a card may speak of a network of any size, the tensors are those of the file.
        skeleton = build_skeleton(card, source)
        _compare(skeleton, card, state_dict, source)
        network = build_network(card.architecture, len(card.classes))
        network.load_state_dict(state_dict)
    except (RuntimeError, MemoryError) as error:
        raise _unusable(card, source, str(error)) from error
    return network.eval()


def build_skeleton(card: ModelCard, source: str) -> SegmentationNetwork:
    """The network of a card on the "meta" device: names and shapes, which take no memory.

    Args:
        card: A model's card.
        source: Name of the file that it came from, for errors.

    Raises:
        ArtifactError: No network can be built of it, or one whose tables that no file holds exceed `MOST_TABLES`.
        RecipeError: The installed timm has no such encoder.
    """
    try:
        with torch.device("meta"):
            network = build_network(card.architecture, len(card.classes))
    except WsssError:
        raise
    except Exception as error:  # timm's models raise almost anything on options that they do not expect
        raise _unusable(card, source, str(error)) from error
    held = network.state_dict().keys()
    tables = sum(table.nbytes for name, table in network.named_buffers() if name not in held)
    if tables > MOST_TABLES:
        raise _unusable(card, source, f"its tables take {tables >> 20} MiB")
    return network.eval()


def _unusable(card: ModelCard, source: str, reason: str) -> ArtifactError:
    first = reason.strip().partition("\n")[0][:200]
    return ArtifactError(
        f"{source}: no network can be built of the architecture {card.architecture.encoder} of its card ({first}); "
        "train it again with this release, or free memory"
    )


def _compare(network: SegmentationNetwork, card: ModelCard, state_dict: Mapping[str, Tensor], source: str) -> None:
    expected = network.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in state_dict]
    problems += [f"unknown {name}" for name in state_dict if name not in expected]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)} for {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state_dict and state_dict[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ArtifactError(
            f"{source}: its tensors do not fit the architecture {card.architecture.encoder} of its card: "
            f"{'; '.join(problems[:3])}{more}; train it again with this release"
        )
