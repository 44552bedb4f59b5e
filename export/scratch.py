"""Hidden folders for files that are not finished, and how these take their names once they are."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

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


def replace_together(*moves: tuple[Path, Path]) -> None:
    """Give files that belong together their names: all of them, or none.

    SIGTERM and Ctrl-C wait until it is over, where this is called in the main thread: in others nothing holds them, as
    Python allows handlers there only. After an error, files of those names are what they were, but for those that the
    file system does not give back. That, or a kill that nothing can hold (SIGKILL), may leave some of them new and
    others old, which digests tell when they are read.

    Args:
        moves: Finished files, in a folder of `scratch_folder`, and their names on the same file system. The one that
            users open comes last.

    Raises:
        OSError: A name cannot be taken.
    """
    done: list[tuple[Path, Path | None]] = []
    with _signals_held():
        try:
            for source, target in moves:
                kept = _kept(source, target)
                os.replace(source, target)
                done.append((target, kept))
        except BaseException:
            for target, kept in reversed(done):
                # One that fails keeps neither the others from their names nor the first error from being told.
                with suppress(OSError):
                    if kept is None:
                        target.unlink(missing_ok=True)
                    else:
                        os.replace(kept, target)
            raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that `replace_together` moves: after a loss of power its name must not stand for an empty file.

    Args:
        path: In a folder of `scratch_folder`.
        content: Its bytes.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _kept(source: Path, target: Path) -> Path | None:
    """The file that is going to be replaced, by a second name; None if there is none."""
    if not target.is_file():
        return None  # also of a folder, which nothing replaces
    kept = source.with_name(f"{source.name}.before")
    try:
        os.link(target, kept)
    except OSError:  # a file system without links
        shutil.copy2(target, kept)
    return kept


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that would end the process come after the block. Python runs handlers in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])
