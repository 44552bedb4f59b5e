"""The tab Compare: two models on one image: overlays, where they differ, how far they agree, how long they took."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from demo import markup
from demo.comparing import compare, difference_image
from demo.files import PageFiles, explain
from demo.registry import Models
from demo.segment_tab import html, image_input, model_choice
from demo.segmenting import SHOWN_SIDE, Limits, segment_upload, shown, uploaded_file


def compare_tab(models: Models, limits: Limits, files: PageFiles) -> tuple[Any, Any, Any]:
    """Build the tab inside the current page.

    Returns:
        Its image input and its two lists of models.
    """
    handlers = _Handlers(models, limits, files)
    html(markup.title("Compare two models", "The same image through both; classes are matched by name."))
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = image_input("compare-upload")
            first = model_choice(models, "compare-first", "First model")
            second = model_choice(models, "compare-second", "Second model", place=1)
        with gr.Column(scale=3, min_width=300):
            message = html(markup.hint(), elem_id="compare-message")
            with gr.Column(visible=False, elem_id="compare-results") as results:
                show = partial(gr.Image, interactive=False, buttons=["fullscreen"])
                with gr.Row():
                    left = show(label="First", elem_id="compare-left", min_width=200)
                    right = show(label="Second", elem_id="compare-right", min_width=200)
                difference = show(label="Pixels of different classes", elem_id="compare-difference")
                told = html(elem_id="compare-told", container=True, padding=True)
    for event in (upload.change, first.input, second.input):
        event(
            handlers.compare,
            [upload, first, second],
            [message, results, left, right, difference, told],
            preprocess=False,
            concurrency_limit=limits.concurrency,
            concurrency_id="model",
            api_visibility="private",
        )
    return upload, first, second


class _Handlers:
    def __init__(self, models: Models, limits: Limits, files: PageFiles) -> None:
        self._models = models
        self._limits = limits
        self._files = files

    def compare(self, upload: object, *keys: object) -> tuple[Any, ...]:
        """The values of all outputs for what the browser sent, or a message in their place."""
        if upload is None:
            return self._nothing(markup.hint())
        try:
            file = uploaded_file(upload, self._files.cache)
            segmenters = [self._models.open(key) for key in keys]
            first, second = (segment_upload(segmenter, file, self._limits) for segmenter in segmenters)
            agreement = compare(first, second)
        except Exception as error:
            return self._nothing(explain(error))
        overlays = [
            self._files.jpeg(shown(result, file.stem, segmenter.card).overlay(0.5), f"{file.stem}_{place}.jpg")
            for result, segmenter, place in zip((first, second), segmenters, ("first", "second"), strict=True)
        ]
        difference = difference_image(first.image, agreement.differs, SHOWN_SIDE)
        return (
            gr.HTML(visible=False),
            gr.Column(visible=True),
            *overlays,
            self._files.jpeg(difference, f"{file.stem}_difference.jpg"),
            markup.comparison(
                agreement.share,
                agreement.classes,
                [(str(key), result.timing, segmenter.describe())
                 for key, result, segmenter in zip(keys, (first, second), segmenters, strict=True)],
            ),
        )  # fmt: skip

    def _nothing(self, message: str) -> tuple[Any, ...]:
        return gr.HTML(message, visible=True), gr.Column(visible=False), None, None, None, ""
