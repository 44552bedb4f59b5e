"""Gradio's page, with what browsers send checked before gradio acts on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.block_function import BlockFunction

from demo.segmenting import uploaded_file
from wsss_deploy.errors import ImageError

if TYPE_CHECKING:
    from demo.runs import Runs


class GuardedBlocks(gr.Blocks):
    """A page whose requests can name uploaded files and nothing else.

    Gradio copies every file that a request names into the folder that it serves, and fetches addresses for it. It
    checks the place of such files only in a page that was started by `launch`, not in one that is mounted.

    Attributes:
        runs: What trains; there only where a folder is annotated.
    """

    runs: Runs

    async def preprocess_data(self, block_fn: BlockFunction, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """As in gradio, unless the request names another file.

        Raises:
            gr.Error: It does.
        """
        try:
            _check_files(inputs, Path(self.GRADIO_CACHE))
        except ImageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return await super().preprocess_data(block_fn, inputs, *rest, **options)


def _check_files(value: object, folder: Path) -> None:
    if isinstance(value, dict):
        if "path" in value:
            uploaded_file(value, folder)
        _check_files(list(value.values()), folder)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            _check_files(part, folder)
