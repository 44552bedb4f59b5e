"""Files that the browser fetches, and what every tab says when something is wrong."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from demo import markup
from wsss_deploy.errors import WsssError

logger = logging.getLogger(__name__)


class PageFiles:
    """Writes what the browser is shown, under addresses that cannot be guessed; gradio deletes them by age.

    Args:
        cache: Gradio's folder for uploads and for files that the browser fetches.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def write(self, name: str, save: Callable[[Path], None]) -> str:
        """Write a file and tell its path."""
        folder = self.cache / secrets.token_hex(16)
        folder.mkdir(parents=True)
        save(folder / name)
        return str(folder / name)

    def jpeg(self, image: Image.Image, name: str) -> str:
        """Write an image as JPEG, without subsampling: that would wash out the thin outlines."""
        return self.write(name, lambda target: image.save(target, quality=90, subsampling=0))


def explain(error: Exception) -> str:
    """The message for the page; what nobody foresaw goes to the terminal, too."""
    if isinstance(error, WsssError):
        return markup.problem(str(error))
    logger.error("a request could not be answered", exc_info=error)
    return markup.problem(f"Unexpected {type(error).__name__}; the terminal of wsss-demo shows more.")
