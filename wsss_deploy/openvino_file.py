"""`model.xml` and `model.bin`: OpenVINO's form of a model, with the card in the first and a digest that ties the two.

Read without OpenVINO, so that a card can be asked for anywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from xml.etree import ElementTree

from wsss_deploy.errors import ArtifactError

CARD_ENTRY, WEIGHTS_ENTRY = "wsss_card", "wsss_weights_sha256"
_LARGEST = 64 * 2**20


def weights_path(model: Path) -> Path:
    """The file of the weights that belongs to a `model.xml`."""
    return model.with_suffix(".bin")


def weights_digest(model: Path) -> str:
    """SHA-256 of the weights beside a `model.xml`.

    Raises:
        ArtifactError: There are none.
    """
    weights = weights_path(model)
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{model}: its weights {weights.name} cannot be read ({error.strerror or error}); copy both files"
        ) from error


def read_entries(model: Path) -> dict[str, str]:
    """What `wsss-export` wrote into a `model.xml`.

    Args:
        model: The file.

    Raises:
        ArtifactError: It is damaged, or not ours.
    """
    try:
        if model.stat().st_size > _LARGEST:
            raise ArtifactError(f"{model}: is no model description ({model.stat().st_size >> 20} MiB); export it again")
        text = model.read_bytes().decode("utf-8")
    except OSError as error:
        raise ArtifactError(f"{model}: cannot be read ({error.strerror or error}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{model}: is no UTF-8 text, as every model is; copy or export it again") from error
    # OpenVINO writes none of them; entities could unfold into more than any memory, or name files. As a text, and
    # without zeros, it is not read in another encoding than it was looked at.
    if "<!DOCTYPE" in text or "<!ENTITY" in text or "\0" in text:
        raise ArtifactError(f"{model}: declares XML entities, which no model does; export it again")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ArtifactError(f"{model}: is no XML or cut short ({error}); copy or export it again") from error
    found = {}
    for name in (CARD_ENTRY, WEIGHTS_ENTRY):
        entry = root.find(f"rt_info/{name}")
        value = None if entry is None else entry.get("value")
        if value is None:
            raise ArtifactError(
                f"{model}: an OpenVINO model of other origin: it lacks the entry '{name}'; export one with "
                "wsss-export --format openvino"
            )
        found[name] = value
    return found


def check_weights(model: Path) -> None:
    """Check that the weights beside a `model.xml` are those that it was written with.

    Raises:
        ArtifactError: They are not.
    """
    if weights_digest(model) != read_entries(model)[WEIGHTS_ENTRY]:
        raise ArtifactError(
            f"{model}: {weights_path(model).name} beside it belongs to another model or is cut short (as after an "
            "export that was killed); copy both files again, or export again"
        )
