"""Metadata of an ONNX file without an ONNX library and without its tensors.

An ONNX file is one protobuf message, `ModelProto`. Only its outermost fields are walked; long ones (the graph) are
skipped by seeking, so that a file of gigabytes costs a few reads, and no length in the file is trusted.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from wsss_deploy.errors import ArtifactError

_IR_VERSION, _GRAPH, _METADATA_PROPS = 1, 7, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_FIELDS = 100_000
_LARGEST_ENTRY = 16 * 2**20


class _Malformed(Exception):
    pass


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Read `metadata_props` of an ONNX model.

    Args:
        path: The file.

    Returns:
        The entries by key; empty if there are none.

    Raises:
        ArtifactError: The file is no ONNX model, or is cut short.
        OSError: It cannot be read.
    """
    entries: dict[str, str] = {}
    seen: set[int] = set()
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            for _ in range(_MOST_FIELDS):
                if file.tell() == end:
                    break
                field, wire = _tag(file)
                seen.add(field)
                if wire == _VARINT:
                    _varint(file)
                elif wire == _BYTES:
                    length = _varint(file)
                    if file.tell() + length > end:
                        raise ArtifactError(
                            f"{path}: is cut short (a part of {length} bytes begins {end - file.tell()} bytes before "
                            "its end); copy or export it again"
                        )
                    if field == _METADATA_PROPS and length <= _LARGEST_ENTRY:
                        key, value = _entry(file.read(length))
                        entries[key] = value
                    else:
                        file.seek(length, os.SEEK_CUR)
                elif wire in (_FIXED64, _FIXED32):
                    file.seek(8 if wire == _FIXED64 else 4, os.SEEK_CUR)
                else:
                    raise _Malformed(f"wire type {wire}")
                if file.tell() > end:
                    raise _Malformed("it ends inside a field")
            else:
                raise _Malformed(f"more than {_MOST_FIELDS} fields")
        except (_Malformed, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{path}: is no ONNX model, or a damaged one ({error}); export it again with wsss-export"
            ) from error
    if not {_IR_VERSION, _GRAPH} <= seen:
        raise ArtifactError(f"{path}: is no ONNX model (no graph inside); export one with wsss-export")
    return entries


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _Malformed("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
    raise _Malformed("a number of more than 64 bits")


def _tag(file: BinaryIO) -> tuple[int, int]:
    tag = _varint(file)
    if tag >> 3 == 0:
        raise _Malformed("field number 0")
    return tag >> 3, tag & 7


def _entry(content: bytes) -> tuple[str, str]:
    """Parse one `StringStringEntryProto`: field 1 is the key, field 2 the value."""
    texts = {1: "", 2: ""}
    file = io.BytesIO(content)
    while file.tell() < len(content):
        field, wire = _tag(file)
        length = _varint(file)
        if wire != _BYTES or file.tell() + length > len(content):
            raise _Malformed("metadata that is not text")
        texts[field] = file.read(length).decode("utf-8")
    return texts[1], texts[2]
