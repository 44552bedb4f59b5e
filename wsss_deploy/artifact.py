"""Model files: written whole or not at all, checked before anything heavy is loaded.

`model.pt` is `torch.save` of `{"format": "wsss-deploy", "card": plain data, "state_dict": tensors}`, read with
`weights_only=True`. `model.onnx` carries the card's JSON in its metadata under `wsss_card`, `model.engine` in the
manifest beside it, `model.xml` in its run-time information. Which of them a file is meant to be is told by its name,
and then checked by its content.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsss_deploy.card import ModelCard
from wsss_deploy.engine_manifest import read_manifest
from wsss_deploy.errors import ArtifactError
from wsss_deploy.files import atomic_write
from wsss_deploy.onnx_metadata import read_onnx_metadata
from wsss_deploy.openvino_file import CARD_ENTRY, read_entries
from wsss_deploy.torch_file import read_plain_part

if TYPE_CHECKING:
    import torch

FORMAT = "wsss-deploy"
#: What a run's `checkpoint.pt` says in place of it; here so that a training state is told from a stranger's file.
TRAINING_STATE_FORMAT = "wsss-deploy-training-state"
CARD_KEY = "wsss_card"
KNOWN_SUFFIXES = (".pt", ".onnx", ".engine", ".xml")


def save_model(path: str | os.PathLike[str], card: ModelCard, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a `model.pt`; a reader sees the old file or the whole new one.

    Args:
        path: Where to write.
        card: The model's card.
        state_dict: The network's tensors, on any device; written as CPU tensors.

    Raises:
        WsssError: The file cannot be written.
    """
    import torch

    # A tensor that is a view would drag its whole storage into the file; a clone has its own.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()}
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "card": card.to_plain(), "state_dict": tensors}, file)


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """Read a model file's card without torch, onnxruntime or the tensors.

    Args:
        path: A `.pt`, `.onnx`, `.engine` or `.xml` file.

    Raises:
        ArtifactError: The file is absent, of another kind, damaged, or not ours; the message says which.
    """
    model = check_path(path)
    if model.suffix.lower() == ".engine":
        return read_manifest(model).card
    if model.suffix.lower() == ".xml":
        return ModelCard.from_plain(read_entries(model)[CARD_ENTRY], str(model))
    try:
        if model.suffix.lower() == ".onnx":
            metadata = read_onnx_metadata(model)
            if CARD_KEY not in metadata:
                raise ArtifactError(
                    f"{model}: an ONNX model of other origin: it lacks the metadata entry '{CARD_KEY}' (classes, "
                    "palette, sizing); export one with wsss-export"
                )
            return ModelCard.from_plain(metadata[CARD_KEY], str(model))
        return ModelCard.from_plain(_content(read_plain_part(model), model)["card"], str(model))
    except OSError as error:
        raise ArtifactError(f"{model}: cannot be read ({error.strerror or error}); check its permissions") from error


def load_model(path: str | os.PathLike[str]) -> tuple[ModelCard, dict[str, torch.Tensor]]:
    """Load a `model.pt` onto the CPU.

    Args:
        path: The file.

    Returns:
        The card and the network's tensors by name.

    Raises:
        ArtifactError: As `read_card`; also if its tensors are damaged.
    """
    card = read_card(path)  # first: refuses foreign and malicious files with the clearer message
    model = Path(path)
    if model.suffix.lower() != ".pt":
        raise ArtifactError(f"{model}: holds no tensors for torch; pass the model.pt that it was exported from")
    import torch

    try:
        data = torch.load(model, map_location="cpu", weights_only=True)
        # torch does not check the entries' checksums.
        with zipfile.ZipFile(model) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zip, pickle and torch raise many kinds on damaged files
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{model}: its tensors cannot be loaded ({reason}); copy or train it again") from error
    if damaged is not None:
        raise ArtifactError(f"{model}: is damaged (wrong checksum of {damaged}); copy or train it again")
    state_dict = _content(data, model)["state_dict"]
    if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ArtifactError(f"{model}: its state_dict holds other things than tensors; train it again with wsss-train")
    return card, dict(state_dict)


def check_path(path: str | os.PathLike[str]) -> Path:
    """Check that a path names an existing file of a known kind.

    Args:
        path: The path as the user gave it.

    Returns:
        The path.

    Raises:
        ArtifactError: It does not.
    """
    model = Path(path)
    if model.is_dir():
        raise ArtifactError(f"{model}: is a folder, expected a model file; pass the model.pt or model.onnx inside it")
    if not model.is_file():
        raise ArtifactError(f"{model}: no such model file; check the path")
    if model.suffix.lower() not in KNOWN_SUFFIXES:
        raise ArtifactError(
            f"{model}: unknown kind of model file '{model.suffix}', known are {', '.join(KNOWN_SUFFIXES)}; "
            "wsss-train writes the first, wsss-export the others"
        )
    if model.stat().st_size == 0:
        raise ArtifactError(f"{model}: is empty (0 bytes); copy, train or export it again")
    return model


def _content(data: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(data, Mapping) and data.get("format") == TRAINING_STATE_FORMAT:
        raise ArtifactError(
            f"{path}: is the training state of a run, which wsss-train --resume goes on from, expected a model; use "
            "the run's model.pt, which lies beside it once the training has ended"
        )
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = f"a {type(data).__name__}"
        if isinstance(data, Mapping):
            found = "the keys " + (", ".join(sorted(map(str, data))[:5]) or "none")
        raise ArtifactError(
            f"{path}: a torch file of other origin: found {found}, expected format '{FORMAT}' with card and "
            "state_dict; train one with wsss-train"
        )
    missing = [key for key in ("card", "state_dict") if not isinstance(data.get(key), Mapping)]
    if missing:
        raise ArtifactError(f"{path}: lacks {' and '.join(missing)}; train it again with wsss-train")
    return data


def report_name(model: str) -> str:
    """Name of the parity report beside a file: `parity.json` for `model.onnx`, `parity.fp16.engine.json` for an engine.

    Args:
        model: Name of the file.
    """
    path = Path(model)
    kind = "" if path.suffix == ".onnx" else path.suffix
    return f"parity{path.stem.removeprefix('model')}{kind}.json"
