"""The tab Why: what the refinement along the image changes, before against after, with its parameters live."""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo import markup
from demo.comparing import REACHES, Unrefined, changed_share, refinement_of
from demo.files import PageFiles, explain
from demo.registry import Models
from demo.segment_tab import KEPT_SECONDS, html, image_input, model_choice
from demo.segmenting import SHOWN_SIDE, Limits, segment_upload, uploaded_file
from wsss_deploy.refinement import DEFAULT


def why_tab(models: Models, limits: Limits, files: PageFiles) -> tuple[Any, Any]:
    """Build the tab inside the current page.

    Returns:
        Its image input and its list of models.
    """
    handlers = _Handlers(models, limits, files)
    session = gr.State(None, time_to_live=KEPT_SECONDS)
    html(markup.title("Why these edges?", "The refinement moves the network's borders to those of the image."))
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = image_input("why-upload")
            model = model_choice(models, "why-model")
            steps = gr.Slider(
                0, 30, value=DEFAULT.parameters.iterations, step=1, label="Iterations", elem_id="why-iterations"
            )
            sharpness = gr.Slider(
                0.25, 4, value=1, step=0.05, label="Sharpness",
                info="how strongly colour edges stop it", elem_id="why-sharpness",
            )  # fmt: skip
            reach = gr.Radio(list(REACHES), value="middle", label="Reach", elem_id="why-reach")
        with gr.Column(scale=3, min_width=300):
            message = html(markup.hint(), elem_id="why-message")
            with gr.Column(visible=False, elem_id="why-results") as results:
                slider = gr.ImageSlider(
                    label="Before | after", show_label=False, interactive=False, elem_id="why-slider", type="filepath",
                    buttons=["fullscreen"],
                )  # fmt: skip
                told = html(elem_id="why-told")
    outputs = [message, results, slider, told]
    run = {
        "preprocess": False,
        "concurrency_limit": limits.concurrency,
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    parameters = [steps, sharpness, reach]
    for event in (upload.change, model.input):
        event(handlers.predict, [upload, model, *parameters], [session, *outputs], **run)
    for control in parameters:
        control.input(
            handlers.refine,
            [session, *parameters],
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return upload, model


class _Handlers:
    def __init__(self, models: Models, limits: Limits, files: PageFiles) -> None:
        self._models = models
        self._limits = limits
        self._files = files

    def predict(self, upload: object, key: object, steps: Any, sharpness: Any, reach: Any) -> tuple[Any, ...]:
        """Run the network without refinement, keep its scores, and show both."""
        if upload is None:
            return None, *self._nothing(markup.hint())
        try:
            file = uploaded_file(upload, self._files.cache)
            segmenter = self._models.open(key, refine=False)
            kept = Unrefined.of(segment_upload(segmenter, file, self._limits), segmenter.card, file.stem, SHOWN_SIDE)
            return kept, *self._show(kept, steps, sharpness, reach)
        except Exception as error:
            return None, *self._nothing(explain(error))

    def refine(self, kept: Unrefined | None, steps: Any, sharpness: Any, reach: Any) -> Any:
        """Refine the kept scores with other parameters; the network does not run."""
        return (gr.skip(),) * 4 if kept is None else self._show(kept, steps, sharpness, reach)

    def _show(self, kept: Unrefined, steps: Any, sharpness: Any, reach: Any) -> tuple[Any, ...]:
        settings = refinement_of(steps, sharpness, reach)
        before, after = kept.result(None), kept.result(settings)
        pair = tuple(
            self._files.jpeg(result.overlay(), f"{kept.name}_{when}.jpg")
            for result, when in ((before, "before"), (after, "after"))
        )
        told = markup.pairs(
            {
                "Left": "as the network gave it",
                "Right": str(settings) if settings.parameters.iterations else "the same (0 iterations)",
                "Changed": f"{100 * changed_share(before, after):.2f} % of the pixels",
            }
        )
        return gr.HTML(visible=False), gr.Column(visible=True), pair, told

    def _nothing(self, message: str) -> tuple[Any, ...]:
        return gr.HTML(message, visible=True), gr.Column(visible=False), None, ""
