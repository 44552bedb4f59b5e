"""Writing files so that a reader sees a whole file or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wsss_deploy.errors import WsssError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block has ended without an error.

    The bytes go to a temporary file in the same folder, which then replaces `path`. After an error or an
    interruption nothing of it is left, and an older file of that name is untouched.

    Args:
        path: Where the file is to be; missing folders are made.

    Yields:
        A binary file.

    Raises:
        WsssError: The file cannot be written there.
    """
    target = Path(path)
    # A short name of its own: the target's name plus a suffix could exceed the file system's limit.
    temporary = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise WsssError(
            f"{target}: cannot be written ({error.strerror or error}); choose a writable folder with free space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
