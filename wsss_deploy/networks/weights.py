"""Where a network's starting weights come from: timm's hub, a local file, or a model.pt of ours."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file
from torch import Tensor, nn

from wsss_deploy.errors import TrainingError
from wsss_deploy.networks.encoder import Encoder

_log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model", "model_state", "teacher")
_PREFIXES = ("module.", "encoder.model.", "encoder.", "backbone.", "model.")
_NONE = "or start from random weights with --weights none"


def read_weights(weights: str | os.PathLike[str], encoder: Encoder) -> dict[str, Tensor]:
    """Tensors by name, from timm's hub or a file.

    Args:
        weights: "timm" or a path.
        encoder: The encoder that they are for.

    Returns:
        Names as in the file, without wrappers.

    Raises:
        TrainingError: They cannot be had.
    """
    return _download(encoder) if str(weights) == "timm" else _read_file(Path(weights))


def load_encoder_weights(encoder: Encoder, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into the (unpruned) encoder; the classifier is left out, a position table is resampled.

    Args:
        encoder: Changed in place.
        state: Tensors by name, with timm's names or those that timm can convert.
        source: For messages.

    Raises:
        TrainingError: They do not fit; the message names what is missing or of another shape.
    """
    model = encoder.model
    own = model.state_dict()
    state = _without_prefix(state, own)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        # timm's own conversion: other projects' names, manual patch embeddings, position tables of another grid.
        takes_model = len(inspect.signature(convert).parameters) > 1
        try:
            state = convert(dict(state), model) if takes_model else convert(dict(state))
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            raise TrainingError(
                f"{source}: timm cannot convert these weights to '{encoder.name}' ({_first_line(error)}); "
                f"give weights of that model, {_NONE}"
            ) from error
    missing = [name for name in own if name not in state]
    misfits = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or misfits:
        raise TrainingError(
            f"{source}: does not fit encoder '{encoder.name}': {_listing('lacks', missing)}"
            f"{_listing('other shapes of', misfits)}give weights of that timm model, {_NONE}"
        )
    unused = [name for name in state if name not in own]
    model.load_state_dict({name: state[name] for name in own})
    if unused:
        _log.info("%s: left out, as segmentation does not need them: %s", Path(source).name, _some(unused))


def load_network_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of a `model.pt` into the whole network (fine-tuning).

    Args:
        network: Changed in place.
        state: The other network's tensors.
        source: For messages.

    Raises:
        TrainingError: Another architecture.
    """
    own = network.state_dict()
    last = {name for name in own if name.startswith("decoder.classify.")}
    fits = {name for name in own if name in state and state[name].shape == own[name].shape}
    wrong = [name for name in own if name not in fits and name not in last]
    wrong += sorted(state.keys() - own.keys())
    if wrong:
        raise TrainingError(
            f"{source}: was trained with another architecture: {_listing('differs in', wrong)}"
            f"fine-tune with its own encoder, decoder and decoder_width, {_NONE}"
        )
    network.load_state_dict({name: state[name] for name in fits}, strict=False)
    if not last <= fits:
        _log.info("%s: its last layer has another number of classes and starts anew", Path(source).name)


def _download(encoder: Encoder) -> dict[str, Tensor]:
    if not timm.is_model_pretrained(encoder.name):
        raise TrainingError(f"timm has no pretrained weights for '{encoder.name}'; choose another encoder, {_NONE}")
    # Without this the hub's client tries five times over a minute before it says that there is no network.
    was_offline = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = was_offline or not _hub_has_address()
    try:
        model = timm.create_model(encoder.name, pretrained=True)
    except Exception as error:  # hub clients raise their own kinds for each way in which a network can fail
        raise TrainingError(
            f"the weights of '{encoder.name}' could not be downloaded ({type(error).__name__}: {_first_line(error)}); "
            f"check the network, give a local file with --weights PATH, {_NONE}"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = was_offline
    state: dict[str, Tensor] = model.state_dict()
    return state


def _hub_has_address() -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business, so it counts as known."""
    if urllib.request.getproxies():
        return True
    host = urlsplit(hub.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TrainingError(f"{path}: no such weights file; --weights takes timm, none, or the path of a file")
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise TrainingError(f"{path}: unknown kind of weights file '{suffix}'; expected .safetensors, .pt or .pth")
    try:
        content: Any = (
            load_file(path) if suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror or 'damaged'}); copy it again") from error
    except Exception as error:  # torch and pickle raise almost anything, and advise to load without care
        raise TrainingError(
            f"{path}: is damaged, or holds other things than plain tensors, which could run code and are not loaded; "
            "copy it again, or save the model's state_dict"
        ) from error
    while isinstance(content, Mapping) and (wrapper := next((key for key in _WRAPPERS if key in content), None)):
        content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise TrainingError(f"{path}: holds no tensors by name; expected a state_dict, {_NONE}")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if any(name in own for name in state):
        return state
    for prefix in _PREFIXES:
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if any(name in own for name in inner):
            return inner
    return state  # perhaps timm knows these names


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listing(what: str, names: list[str]) -> str:
    return f"{what} {_some(names)}; " if names else ""
