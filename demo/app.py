"""The page: one image in, overlay, legend, confidence and timing out."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo import markup
from demo.requirement import require_gradio
from demo.segmenting import Limits, Shown, confidence_image, segment_upload, shown, uploaded_file
from wsss_deploy.errors import WsssError

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

    from wsss_deploy.card import ModelCard
    from wsss_deploy.segmenter import Segmenter

logger = logging.getLogger(__name__)

_DEFAULT_OPACITY = 0.5
#: Files that the page made are looked through this often and deleted at this age, in seconds.
_CACHE_CHECK, _CACHE_AGE = 600, 3600


def build_app(
    segmenter: Segmenter, examples: Sequence[str | os.PathLike[str]] = (), limits: Limits | None = None
) -> gr.Blocks:
    """Build the page.

    Serve it with `demo.server.make_server`, or mount it into a FastAPI application with
    `gradio.mount_gradio_app(app, page, path="/segment")`. Visitors share the model and nothing else: what
    one of them has uploaded lives in the gradio session of that page view.

    Args:
        segmenter: The model; used from several threads.
        examples: Images that are offered to be clicked.
        limits: What the page accepts; None takes the defaults.

    Returns:
        A `gradio.Blocks`, not started.

    Raises:
        WsssError: Gradio is not installed.
    """
    require_gradio()
    import gradio as gr

    from demo.guard import GuardedBlocks

    limits = limits or Limits()
    card = segmenter.card
    offered = [os.fspath(example) for example in examples]
    html = partial(gr.HTML, css_template=markup.STYLE, apply_default_css=False)
    with GuardedBlocks(
        title=f"{card.name}: segment an image", analytics_enabled=False, delete_cache=(_CACHE_CHECK, _CACHE_AGE)
    ) as page:
        session = gr.State(None, time_to_live=_CACHE_AGE)
        html(markup.header(card, segmenter.describe()), elem_id="header")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                upload = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], elem_id="upload")
                if offered:
                    gr.Examples([[path] for path in offered], [upload], label="Examples", elem_id="examples")
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
                            opacity = gr.Slider(
                                0, 1, value=_DEFAULT_OPACITY, step=0.05, label="Opacity", elem_id="opacity"
                            )
                        with gr.Tab("Confidence"):
                            confidence = show(
                                elem_id="confidence",
                                buttons=["download", "fullscreen"],
                                alt_text="Confidence of every pixel, dark is low",
                            )
                            html(markup.scale())
                    legend = html(elem_id="legend", container=True, padding=True)
                    download = gr.DownloadButton("Download mask (PNG)", elem_id="download")
                    timing = html(elem_id="timing", container=True, padding=True)
        with gr.Accordion("About this model", open=False, elem_id="card"):
            html(markup.model_card(card))

        handlers = _Handlers(segmenter, limits, Path(page.GRADIO_CACHE))
        upload.change(
            handlers.segment,
            [upload, opacity],
            [message, results, overlay, confidence, legend, download, timing, session],
            preprocess=False,  # gradio would decode the file before any limit of ours and with its own errors
            concurrency_limit=limits.concurrency,
            api_visibility="private",
        )
        opacity.input(
            handlers.blend,
            [session, opacity],
            overlay,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    page.queue(max_size=limits.queue, default_concurrency_limit=4, api_open=False)
    page.state_session_capacity = limits.sessions
    return page


class _Handlers:
    """What the page's events call; keeps nothing between two calls.

    Args:
        segmenter: The model.
        limits: What is accepted.
        cache: Gradio's folder for uploads and for files that the browser fetches.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits, cache: Path) -> None:
        self._segmenter = segmenter
        self._limits = limits
        self._cache = cache

    @property
    def _card(self) -> ModelCard:
        return self._segmenter.card

    def segment(self, upload: object, opacity: float) -> tuple[Any, ...]:
        """The values of all outputs for what the browser sent, or a message in their place."""
        if upload is None:
            return self._nothing(markup.hint())
        try:
            file = uploaded_file(upload, self._cache)
            result = segment_upload(self._segmenter, file, self._limits)
        except WsssError as error:
            return self._nothing(markup.problem(str(error)))
        except Exception as error:
            logger.exception("an upload could not be segmented")
            return self._nothing(
                markup.problem(f"Unexpected {type(error).__name__}; the terminal of wsss-demo shows more.")
            )
        import gradio as gr

        kept = shown(result, file.stem)
        return (
            gr.HTML(visible=False),
            gr.Column(visible=True),
            self._overlay(kept, opacity),
            self._jpeg(confidence_image(result), f"{kept.name}_confidence.jpg"),
            markup.legend(result.legend()),
            self._file(f"{kept.name}_mask.png", lambda target: result.mask_image().save(target)),
            markup.timing(result.timing, self._segmenter.describe(), result.mask.shape),
            kept,
        )

    def blend(self, kept: Shown | None, opacity: float) -> Any:
        """The overlay with another opacity; the model does not run."""
        import gradio as gr

        return gr.skip() if kept is None else self._overlay(kept, opacity)

    def _nothing(self, message: str) -> tuple[Any, ...]:
        import gradio as gr

        return gr.HTML(message, visible=True), gr.Column(visible=False), None, None, "", None, "", None

    def _overlay(self, kept: Shown, opacity: float) -> str:
        # The browser may send anything in place of the slider's number.
        return self._jpeg(kept.overlay(self._card, min(max(float(opacity), 0.0), 1.0)), f"{kept.name}_overlay.jpg")

    def _jpeg(self, image: Image.Image, name: str) -> str:
        # Without subsampling: it would wash out the thin outlines.
        return self._file(name, lambda target: image.save(target, quality=90, subsampling=0))

    def _file(self, name: str, save: Callable[[Path], None]) -> str:
        """Write a file under an address that cannot be guessed; gradio deletes it by age."""
        folder = self._cache / secrets.token_hex(16)
        folder.mkdir(parents=True)
        save(folder / name)
        return str(folder / name)
