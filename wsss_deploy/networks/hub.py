"""Models on the Hugging Face Hub: `push_to_hub` and `from_pretrained`, with the protocol of the figures.

    from wsss_deploy.networks.hub import HubModel

    HubModel.from_file("model.pt").push_to_hub("me/roads")
    segmenter = HubModel.from_pretrained("me/roads").segmenter()

A repository holds `model.safetensors`, `config.json` with the card, and `README.md`. Nothing that is loaded runs code:
tensors come from safetensors only, and have to fit the card's architecture.
"""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import nn

from wsss_deploy.artifact import load_model, save_model
from wsss_deploy.card import ModelCard
from wsss_deploy.errors import ArtifactError, BackendError
from wsss_deploy.networks.deploy import DeployedNetwork
from wsss_deploy.networks.network import build_skeleton, restore_network
from wsss_deploy.segmenter import Segmenter

try:
    import huggingface_hub
    from safetensors.torch import load_file
except ImportError as error:
    raise BackendError(
        f"the Hub needs huggingface_hub and safetensors ({error}); pip install 'wsss-deploy[train]'"
    ) from error

_TEMPLATE = """---
{{ card_data }}
---

"""


class HubModel(
    nn.Module,
    huggingface_hub.PyTorchModelHubMixin,
    library_name="wsss-deploy",
    pipeline_tag="image-segmentation",
    tags=["semantic-segmentation", "weak-supervision"],
    model_card_template=_TEMPLATE,
):
    """A network with its card, as the Hub's mixin wants it; without tensors until `from_pretrained` or `from_file`.

    Args:
        card: The model's card as plain data, see `wsss_deploy.card.ModelCard`.

    Raises:
        ArtifactError: It is no card, or one of which no network can be built.
        RecipeError: The installed timm has no such encoder.
    """

    def __init__(self, card: dict[str, Any]) -> None:
        super().__init__()
        self.card = ModelCard.from_plain(card, "config.json")
        self.network = build_skeleton(self.card, "config.json")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Take a `model.pt`.

        Args:
            path: The file.

        Raises:
            ArtifactError: It cannot be used.
        """
        card, state_dict = load_model(path)
        model = cls(card=card.to_plain())
        model.network = restore_network(card, state_dict, str(path))
        return model

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Write a `model.pt`, for example to export it.

        Args:
            path: Where to.
        """
        save_model(path, self.card, self.network.state_dict())

    def segmenter(self, device: str = "cpu") -> Segmenter:
        """A segmenter that runs this network in torch.

        Args:
            device: As in `Segmenter`.
        """
        return Segmenter.from_network(self.network, self.card, device)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and class ids; shapes as in `DeployedNetwork.forward`."""
        scores, mask = DeployedNetwork(self.network, self.card.preprocessing).to(image.device)(image)
        return scores, mask

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        # The mixin's own is lenient by default: tensors that are absent would stay random.
        prefix = "network."
        state = {name.removeprefix(prefix): value for name, value in load_file(model_file).items()}
        model.network = restore_network(model.card, state, model_file).to(map_location)
        return model

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ArtifactError(f"{model_file}: only model.safetensors is loaded from the Hub; push the model again")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> huggingface_hub.ModelCard:
        """`README.md`: the mixin's metadata and the text of `readme`."""
        head = super().generate_model_card(*args, **kwargs)
        return huggingface_hub.ModelCard(f"{str(head).rstrip()}\n\n{readme(self.card)}")


def readme(card: ModelCard) -> str:
    """What a reader has to know of a model, as Markdown: what it is, how it was trained, its figures, how to run it.

    Args:
        card: Its card.
    """
    lines = [
        f"# {card.name}",
        "",
        f"Semantic segmentation into {len(card.classes)} classes: {', '.join(card.classes)}. "
        f"Encoder {card.architecture.encoder}, decoder {card.architecture.decoder}; trained with wsss-deploy.",
        "",
        "## Use",
        "",
        "```python",
        "from wsss_deploy.networks.hub import HubModel",
        "",
        'result = HubModel.from_pretrained("THIS_REPOSITORY").segmenter().predict("photo.jpg")',
        "```",
        "",
        "## Protocol",
        "",
    ]
    protocol = card.protocol
    if protocol is None:
        return "\n".join([*lines, "Not recorded: nothing is known of how this model was trained.", ""])
    weights = "random" if protocol.weights == "none" else protocol.weights
    labels = f"{', '.join(protocol.supervision)}{', simulated from masks' if protocol.simulated else ''}"
    rows = {
        "Labels in training": labels,
        "Method": protocol.method,
        "Data": f"{protocol.data}, {protocol.train_images} training images",
        "Training": f"{protocol.iterations} steps of {protocol.batch_size} images of {protocol.size} px, "
        f"seed {protocol.seed}",
        "Encoder's first weights": weights,
        "Choice of the checkpoint": protocol.selection,
        **protocol.notes,
    }
    figures = {name: f"{value:.4g}" for name, value in protocol.metrics.items()}
    return "\n".join([*lines, *_table(("", ""), rows), "", *_table(("figure", "value"), figures), ""])


def _table(head: tuple[str, str], rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    clean = {name.replace("|", "/"): str(value).replace("|", "/").replace("\n", " ") for name, value in rows.items()}
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in clean.items())]
