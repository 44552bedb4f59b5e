"""Errors that a user can act on.

Every message says what was found, what was expected and what to do next. The commands print these messages in
one or two lines and exit with `exit_status`; anything else that is raised is a defect of this package.
"""

from __future__ import annotations

from collections.abc import Sequence


class WsssError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_status = 1


class UsageError(WsssError):
    """Arguments that cannot be combined or are not known; exit status 2."""

    exit_status = 2


class ImageError(WsssError):
    """An image that cannot be read or used."""


class ArtifactError(WsssError):
    """A model file that is not ours, is damaged or does not fit."""


class BackendError(WsssError):
    """A runtime that is not installed or cannot run here."""


class OutOfMemoryError(BackendError):
    """A runtime that had no room for a batch; a smaller one may fit."""


class RecipeError(WsssError):
    """A training recipe with unknown keys or bad values; lists all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class DataError(WsssError):
    """A data set that cannot be used as it is; `problems` lists everything that was found."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message)


class TrainingError(WsssError):
    """Training that cannot start, resume or go on."""


class ExportError(WsssError):
    """A model that could not be exported."""


class ParityError(ExportError):
    """An exported artifact whose results differ from torch's."""
