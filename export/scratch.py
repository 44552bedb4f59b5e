"""Hidden folders for files that are not finished."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Seconds after which a folder belongs to an export that was killed.
STALE = 24 * 3600


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A hidden folder that is gone after the block; those that killed processes left a day ago go with it.

    Args:
        parent: Where it is; on the same file system, so that finished files can be moved.
        prefix: Begins its name, with a dot.

    Yields:
        The folder.
    """
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as name:
        yield Path(name)
