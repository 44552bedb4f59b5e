"""Gradio's image component, with the file handed over as it was uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from gradio_client.utils import is_http_url_like


def upload_image(**options: Any) -> gr.Image:
    """An image upload that neither decodes the file nor fetches addresses.

    Gradio would decode the file itself, before any limit of ours and with its own errors, and would fetch an address
    that a hand-made request names instead of an upload. Methods of the one instance are replaced, since gradio writes
    a stub file beside the source of every class that is derived from a component.

    Args:
        options: Of `gr.Image`.
    """
    image = gr.Image(type="filepath", **options)
    move = image.async_move_resource_to_block_cache

    async def move_files_only(url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None and is_http_url_like(str(url_or_file_path)):
            raise gr.Error("Addresses are not fetched; upload the image.", print_exception=False)
        return await move(url_or_file_path)

    image.async_move_resource_to_block_cache = move_files_only
    image.preprocess = _path
    return image


def _path(payload: ImageData | None) -> str | None:
    """Path of the uploaded file, which gradio has checked to lie in its upload folder."""
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("Upload the image as a file.", print_exception=False)
    return payload.path
