"""Compiled programs on disk: one file each, whole or absent, checked when read, never needed.

They lie in `$WSSS_CACHE/ptx`, else in `wsss-deploy/ptx` of `$XDG_CACHE_HOME` or `~/.cache`. A folder that cannot be
written only means that every process compiles again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from wsss_deploy.errors import WsssError
from wsss_deploy.files import atomic_write

_log = logging.getLogger(__name__)


def folder() -> Path:
    """Where compiled programs are kept; it need not exist."""
    own = os.environ.get("WSSS_CACHE")
    if own:
        return Path(own) / "ptx"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wsss-deploy" / "ptx"


def key(*parts: str) -> str:
    """Name of a program: a digest of everything that its code depends on.

    Args:
        parts: Source, options, version of the compiler.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} ".encode() + part.encode())
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """A program that was kept, or None; one that is damaged counts as absent.

    Args:
        name: From `key`.
    """
    with suppress(OSError, RuntimeError):  # the latter from a machine without a home folder
        head, _, code = (folder() / f"{name}.ptx").read_bytes().partition(b"\n")
        if head == _head(code):
            return code
    return None


def write(name: str, code: bytes) -> None:
    """Keep a program; other processes see all of it or nothing.

    Args:
        name: From `key`.
        code: PTX.
    """
    try:
        with atomic_write(folder() / f"{name}.ptx") as file:
            file.write(_head(code) + b"\n" + code)
    except (WsssError, OSError, RuntimeError) as error:
        _log.debug("compiled program not kept: %s", error)


def _head(code: bytes) -> bytes:
    return b"// sha256 " + hashlib.sha256(code).hexdigest().encode()  # a comment in PTX, too
