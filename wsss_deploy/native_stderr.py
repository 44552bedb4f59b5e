"""Lines that a library in C++ writes to standard error by itself, left out."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_lock = threading.Lock()


@contextmanager
def without_lines(text: bytes) -> Iterator[None]:
    """Keep lines away from standard error (the descriptor 2 of the whole process); all others pass.

    Python's own `sys.stderr` keeps its terminal, so that progress looks as ever. Of several such blocks at the same
    time only the first one acts.

    Args:
        text: What the lines hold.
    """
    if not _lock.acquire(blocking=False):
        yield
        return
    try:
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        reading, writing = os.pipe()
        before = sys.stderr
        with suppress(AttributeError, OSError, ValueError):  # of what has been put into its place
            before.flush()
            if before.fileno() == 2:
                sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, encoding=before.encoding, errors=before.errors)
        os.dup2(writing, 2)
        os.close(writing)
        passing = threading.Thread(target=_pass_on, args=(reading, os.dup(kept), text), daemon=True)
        passing.start()
        try:
            yield
        finally:
            with suppress(OSError, ValueError):
                before.flush()  # what was written by the former object, by handlers of logging for example
            os.dup2(kept, 2)
            os.close(kept)
            if sys.stderr is not before:
                sys.stderr.close()
                sys.stderr = before
            # A process that was started meanwhile may hold its end open for longer; its lines go on being passed.
            passing.join(timeout=2)
    finally:
        _lock.release()


def _pass_on(reading: int, kept: int, text: bytes) -> None:
    with suppress(OSError), open(reading, "rb") as lines, open(kept, "wb", buffering=0) as target:
        for line in lines:
            if text not in line:
                target.write(line)
