"""The tab Segment: one image in, overlay, legend, confidence and timing out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from demo import markup
from demo.files import PageFiles, explain
from demo.registry import Models
from demo.segmenting import Limits, Shown, coco_text, confidence_image, segment_upload, shown, uploaded_file
from wsss_deploy.errors import WsssError

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEFAULT_OPACITY = 0.5
#: Seconds that a visitor's last result is kept.
KEPT_SECONDS = 3600

html = partial(gr.HTML, css_template=markup.STYLE, apply_default_css=False)


def image_input(elem_id: str) -> gr.Image:
    """Where an image comes in: a file, the camera, or the clipboard."""
    return gr.Image(
        type="filepath",
        label="Image",
        sources=["upload", "webcam", "clipboard"],
        webcam_options=gr.WebcamOptions(mirror=False),
        elem_id=elem_id,
    )


def model_choice(models: Models, elem_id: str, label: str = "Model", place: int = 0) -> gr.Dropdown:
    """A list of the models, at first at that place; who handles its value looks it up again."""
    keys = models.keys()
    value = keys[min(place, len(keys) - 1)] if keys else None
    return gr.Dropdown(keys, value=value, label=label, elem_id=elem_id, filterable=False)


def segment_tab(
    page: gr.Blocks,
    models: Models,
    examples: Sequence[str],
    limits: Limits,
    files: PageFiles,
) -> tuple[Any, Any]:
    """Build the tab inside the current page.

    Args:
        page: The page.
        models: What is offered.
        examples: Images that are offered; the first is segmented when the page is opened.
        limits: What is accepted.
        files: Where results go.

    Returns:
        Its image input and its list of models.
    """
    handlers = _Handlers(models, limits, files)
    session = gr.State(None, time_to_live=KEPT_SECONDS)
    title, about = handlers.about(models.default())
    header = html(title, elem_id="header")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = image_input("upload")
            model = model_choice(models, "model")
            if examples:
                gr.Examples([[path] for path in examples], [upload], label="Examples", elem_id="examples")
        with gr.Column(scale=3, min_width=300):
            message = html(markup.hint(), elem_id="message")
            with gr.Column(visible=False, elem_id="results") as results:
                show = partial(gr.Image, interactive=False, show_label=False)
                with gr.Tabs():
                    with gr.Tab("Overlay"):
                        overlay = show(
                            elem_id="overlay",
                            buttons=["download", "fullscreen"],
                            alt_text="The image, tinted by class",
                        )
                        opacity = gr.Slider(0, 1, value=_DEFAULT_OPACITY, step=0.05, label="Opacity", elem_id="opacity")
                    with gr.Tab("Labels"):
                        regions = gr.AnnotatedImage(
                            show_label=False, elem_id="regions", buttons=["fullscreen"], color_map={}
                        )
                    with gr.Tab("Confidence"):
                        confidence = show(
                            elem_id="confidence",
                            buttons=["download", "fullscreen"],
                            alt_text="Confidence of every pixel, dark is low",
                        )
                        html(markup.scale())
                legend = html(elem_id="legend", container=True, padding=True)
                with gr.Row():
                    download = gr.DownloadButton("Download mask", elem_id="download", min_width=120)
                    coco = gr.DownloadButton("Download COCO", elem_id="download-coco", min_width=120)
                    picture = gr.DownloadButton("Download overlay", elem_id="download-overlay", min_width=120)
                timing = html(elem_id="timing", container=True, padding=True)
    with gr.Accordion("About this model", open=False, elem_id="card"):
        card = html(about)

    outputs = [message, results, overlay, regions, confidence, legend, download, coco, picture, timing, session]
    run: Mapping[str, Any] = {
        "preprocess": False,  # gradio would decode the file before any limit of ours and with its own errors
        "concurrency_limit": limits.concurrency,
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    upload.change(handlers.segment, [upload, opacity, model], outputs, **run)
    model.input(handlers.about, model, [header, card], preprocess=False, api_visibility="private").then(
        handlers.segment, [upload, opacity, model], outputs, **run
    )
    opacity.input(
        handlers.blend,
        [session, opacity],
        [overlay, picture],
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    quiet: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
    if examples:
        page.load(lambda shown: gr.skip() if shown else examples[0], upload, upload, **quiet)
    return upload, model


def listing(models: Models) -> Callable[[object], Any]:
    """A handler that brings a list of models up to date and keeps what is chosen, if it is still offered."""

    def refresh(chosen: object) -> Any:
        keys = models.keys()
        return gr.Dropdown(choices=keys, value=chosen if chosen in keys else models.default())

    return refresh


class _Handlers:
    """What the tab's events call; keeps nothing between two calls.

    Args:
        models: What is offered.
        limits: What is accepted.
        files: Where results go.
    """

    def __init__(self, models: Models, limits: Limits, files: PageFiles) -> None:
        self._models = models
        self._limits = limits
        self._files = files

    def about(self, key: object) -> tuple[str, str]:
        """Title and description of a model."""
        try:
            segmenter = self._models.open(key)
        except WsssError as error:
            return markup.header(None, {}), markup.note(str(error))
        return markup.header(segmenter.card, segmenter.describe()), markup.model_card(segmenter.card)

    def segment(self, upload: object, opacity: float, key: object) -> tuple[Any, ...]:
        """The values of all outputs for what the browser sent, or a message in their place."""
        if upload is None:
            return self._nothing(markup.hint())
        try:
            file = uploaded_file(upload, self._files.cache)
            segmenter = self._models.open(key)
            result = segment_upload(segmenter, file, self._limits)
        except Exception as error:
            return self._nothing(explain(error))
        kept = shown(result, file.stem, segmenter.card)
        overlay = self._overlay(kept, opacity)
        image, regions = kept.regions()
        colors = {
            name: "#" + "".join(f"{part:02x}" for part in color)
            for name, color in zip(kept.card.classes, kept.card.palette, strict=True)
        }
        return (
            gr.HTML(visible=False),
            gr.Column(visible=True),
            overlay,
            gr.AnnotatedImage((image, [*regions]), color_map=colors),
            self._files.jpeg(confidence_image(result), f"{kept.name}_confidence.jpg"),
            markup.legend(result.legend()),
            self._files.write(f"{kept.name}_mask.png", lambda target: result.mask_image().save(target)),
            self._files.write(f"{kept.name}_coco.json", partial(_write_text, coco_text(result, file.name))),
            overlay,
            markup.timing(result.timing, segmenter.describe(), result.mask.shape),
            kept,
        )

    def blend(self, kept: Shown | None, opacity: float) -> Any:
        """The overlay with another opacity; the model does not run."""
        if kept is None:
            return gr.skip(), gr.skip()
        overlay = self._overlay(kept, opacity)
        return overlay, overlay

    def _nothing(self, message: str) -> tuple[Any, ...]:
        return gr.HTML(message, visible=True), gr.Column(visible=False), None, None, None, "", *(None,) * 3, "", None

    def _overlay(self, kept: Shown, opacity: float) -> str:
        # The browser may send anything in place of the slider's number.
        return self._files.jpeg(kept.overlay(min(max(float(opacity), 0.0), 1.0)), f"{kept.name}_overlay.jpg")


def _write_text(text: str, target: Path) -> None:
    target.write_text(text, encoding="utf-8")
