"""The plain part of a `model.pt` without torch and without its tensors.

`torch.save` writes a zip file whose entry `data.pkl` is a pickle; tensors are references into further entries. A pickle
can name any function to be called, so this reader resolves the few names that tensors need to inert placeholders and
refuses every other one.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from wsss_deploy.errors import ArtifactError

_LARGEST_PICKLE = 64 * 2**20


class _Placeholder:
    """Stands for a tensor or a storage; accepts what the pickle says about it and does nothing."""

    def __init__(self, *_: object) -> None:
        pass


class _Forbidden(Exception):
    pass


# The Python implementation: a crafted memo index makes the C one allocate gigabytes.
class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module == "torch" and name.endswith("Storage")) or (
            module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
        ):
            return _Placeholder
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_plain_part(path: Path) -> Any:
    """Read the object of a file of `torch.save`, with a placeholder for every tensor.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ArtifactError: The file is no such file, is cut short, or would run code when loaded.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        hint = "; it may be a checkpoint of an old torch, which is not safe to open" if magic[:1] == b"\x80" else ""
        raise ArtifactError(f"{path}: is no model.pt of wsss-deploy (not a zip file){hint}; train one with wsss-train")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ArtifactError(f"{path}: is a zip file without a model inside; train one with wsss-train")
            with archive.open(names[0]) as entry:
                content = entry.read(_LARGEST_PICKLE + 1)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: is cut short or damaged ({error}); copy or train it again") from error
    if len(content) > _LARGEST_PICKLE:
        limit = _LARGEST_PICKLE >> 20
        raise ArtifactError(f"{path}: is no model.pt of wsss-deploy (its plain part exceeds {limit} MiB)")
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except _Forbidden as error:
        raise ArtifactError(
            f"{path}: refused, because loading it would run {error}; a model.pt of wsss-deploy holds only a card and "
            "tensors. Do not open this file with other tools unless you trust its origin"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise ArtifactError(
            f"{path}: is damaged ({type(error).__name__} in its plain part); copy or train it again"
        ) from error
