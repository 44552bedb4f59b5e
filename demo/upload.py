"""Gradio's image component, with the file handed over as it was uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from gradio_client.utils import is_http_url_like


def upload_image(examples: Sequence[str] = (), **options: Any) -> gr.Image:
    """An image upload that takes uploaded files only, as they are.

    Gradio would decode the file itself, before any limit of ours and with its own errors. It would also fetch an
    address that a hand-made request names instead of an upload and, in a page that is mounted and not launched, read
    any file of the server that such a request names. Methods of the one instance are replaced, since gradio
    writes a stub file beside the source of every class that is derived from a component.

    Args:
        examples: Paths of files that may be chosen beside those that were uploaded.
        options: Of `gr.Image`.
    """
    image = gr.Image(type="filepath", **options)
    move = image.async_move_resource_to_block_cache
    uploads = Path(image.GRADIO_CACHE).resolve()
    offered = {Path(example).resolve() for example in examples}

    async def move_uploads_only(url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None:
            path = Path(url_or_file_path).resolve()
            if not (path.is_relative_to(uploads) or path in offered) or is_http_url_like(str(url_or_file_path)):
                raise gr.Error("Only uploaded images are read.", print_exception=False)
        return await move(url_or_file_path)

    image.async_move_resource_to_block_cache = move_uploads_only
    image.preprocess = _path
    return image


def _path(payload: ImageData | None) -> str | None:
    """The uploaded file itself."""
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("Only uploaded images are read.", print_exception=False)
    return payload.path
