"""The tab Why: what the refinement changes, with its parameters live, which pixels one listens to, and class scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from demo import markup
from demo.comparing import REACHES, Unrefined, changed_share, controls_of, refinement_of
from demo.explaining import enlarged, listening, loudest_class, tinted
from demo.files import PageFiles, explain
from demo.registry import Models
from demo.segment_tab import KEPT_SECONDS, html, image_input, model_choice
from demo.segmenting import SHOWN_SIDE, Limits, segment_upload, uploaded_file
from wsss_deploy.activation import activation_maps
from wsss_deploy.errors import WsssError


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
            iterations, sharp, far = handlers.own(models.default())
            steps = gr.Slider(0, 30, value=iterations, step=1, label="Iterations", elem_id="why-iterations")
            sharpness = gr.Slider(
                0.25, 4, value=sharp, step=0.05, label="Sharpness",
                info="how strongly colour edges stop it", elem_id="why-sharpness",
            )  # fmt: skip
            reach = gr.Radio(list(REACHES), value=far, label="Reach", elem_id="why-reach")
        with gr.Column(scale=3, min_width=300):
            message = html(markup.hint(), elem_id="why-message")
            with gr.Column(visible=False, elem_id="why-results") as results, gr.Tabs():
                with gr.Tab("Refinement"):
                    slider = gr.ImageSlider(
                        label="Before | after", show_label=False, interactive=False, elem_id="why-slider",
                        type="filepath", buttons=["fullscreen"],
                    )  # fmt: skip
                    told = html(elem_id="why-told")
                with gr.Tab("Neighbours"):
                    html(
                        markup.note("Choose a pixel, by a click or with the sliders: the light ones decide its class.")
                    )
                    heard = gr.Image(
                        interactive=False, show_label=False, elem_id="why-pixel", buttons=["fullscreen"],
                        alt_text="The pixels that the chosen one listens to",
                    )  # fmt: skip
                    with gr.Row():
                        left = gr.Slider(0, 100, value=50, step=0.5, label="From the left, %", elem_id="why-x")
                        top = gr.Slider(0, 100, value=50, step=0.5, label="From the top, %", elem_id="why-y")
                    listens = html(elem_id="why-listens")
                with gr.Tab("Activation"):
                    chosen = gr.Dropdown([], label="Class", elem_id="why-class", filterable=False)
                    activation = gr.Image(
                        interactive=False, show_label=False, elem_id="why-activation", buttons=["fullscreen"],
                        alt_text="Where the network sees the class",
                    )  # fmt: skip
                    html(markup.scale())
                    learned = html(elem_id="why-learned")
    pair = [message, results, slider, told]
    pixel, activations = [heard, listens], [activation, learned]
    model_events: dict[str, Any] = {
        "preprocess": False,
        "concurrency_limit": limits.concurrency,
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    parameters: list[gr.Slider | gr.Radio] = [steps, sharpness, reach]
    live: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    # The image is seen through the model's own refinement first; what is set by hand then stays for other images.
    chosen_model = model.input(handlers.own, model, parameters, preprocess=False, api_visibility="private")
    for event in (upload.change, chosen_model.then):
        event(
            handlers.predict,
            [upload, model, *parameters, left, top],
            [session, *pair, *pixel, chosen, *activations],
            **model_events,
        )
    for control in parameters:
        control.input(handlers.refine, [session, *parameters, left, top], [*pair, *pixel], **live)
    for place in (left, top):
        place.input(handlers.listen, [session, *parameters, left, top], pixel, **live)
    heard.select(handlers.point, session, [left, top], **live).then(
        handlers.listen, [session, *parameters, left, top], pixel, **live
    )
    chosen.input(handlers.activation, [session, chosen], activations, preprocess=False, **live)
    return upload, model


class _Handlers:
    def __init__(self, models: Models, limits: Limits, files: PageFiles) -> None:
        self._models = models
        self._limits = limits
        self._files = files

    def predict(self, upload: object, key: object, *controls: Any) -> tuple[Any, ...]:
        """Run the network without refinement, keep its scores, and show everything that follows from them."""
        try:
            if upload is None:
                return self._nothing(markup.hint())
            file = uploaded_file(upload, self._files.cache)
            segmenter = self._models.open(key, refine=False)
            kept = Unrefined.of(segment_upload(segmenter, file, self._limits), segmenter.card, file.stem, SHOWN_SIDE)
            classifier = self._models.cams(key)
            if classifier is not None and classifier.card.classes == kept.card.classes:
                seen = segment_upload(classifier, file, self._limits).network_scores
                kept = kept if seen is None else replace(kept, cams=activation_maps(seen))
            name = kept.card.classes[loudest_class(kept.scores, kept.card.classes)]
            choice = gr.Dropdown(choices=list(kept.card.classes), value=name)
            return kept, *self.refine(kept, *controls), choice, *self.activation(kept, name)
        except Exception as error:
            return self._nothing(explain(error))

    def own(self, key: object) -> tuple[Any, Any, Any]:
        """Where the controls stand for a model's own refinement; where it cannot be opened, for the default."""
        try:
            return controls_of(self._models.open(key, refine=False).card.refinement)
        except WsssError:  # said where the image is segmented
            return controls_of(None)

    def refine(self, kept: Unrefined | None, steps: Any, sharpness: Any, reach: Any, *place: Any) -> tuple[Any, ...]:
        """Refine the kept scores with other parameters; the network does not run."""
        if kept is None:
            return (gr.skip(),) * 6
        own, settings = kept.card.refinement, refinement_of(steps, sharpness, reach)
        before, after = kept.result(None), kept.result(settings)
        pair = tuple(
            self._files.jpeg(result.overlay(), f"{kept.name}_{when}.jpg")
            for result, when in ((before, "before"), (after, "after"))
        )
        told = markup.pairs(
            {
                "Left": "as the network gave it",
                "Right": str(settings) if settings.parameters.iterations else "the same (0 iterations)",
                "This model's own": str(own) if own is not None and own.enabled else "none",
                "Changed": f"{100 * changed_share(before, after):.2f} % of the pixels",
            }
        )
        shown = gr.HTML(visible=False), gr.Column(visible=True), pair, told
        return *shown, *self.listen(kept, steps, sharpness, reach, *place)

    def listen(
        self, kept: Unrefined | None, steps: Any, sharpness: Any, reach: Any, left: Any, top: Any
    ) -> tuple[Any, ...]:
        """Draw which pixels the chosen one listens to."""
        if kept is None:
            return (gr.skip(),) * 2
        x, y = (min(max(float(place) / 100, 0.0), 1.0) for place in (left, top))
        found = listening(kept.image, kept.small, refinement_of(steps, sharpness, reach), x, y)
        height, width = kept.small.shape[:2]
        told = markup.pairs(
            {
                "Listens to": f"{found.pixels} of {height * width} pixels for 90 % of its value",
                "On average": f"{found.distance:.1f} pixels away, at {width} × {height}, the network's size",
            }
        )
        return self._files.jpeg(found.picture, f"{kept.name}_neighbours.jpg"), told

    def point(self, kept: Unrefined | None, event: gr.SelectData) -> tuple[Any, Any]:
        """The place of a click as values of the two sliders."""
        if kept is None:
            return gr.skip(), gr.skip()
        height, width = enlarged(kept.image).shape[:2]
        x, y = event.index
        return round(200 * x / width) / 2, round(200 * y / height) / 2

    def activation(self, kept: Unrefined | None, name: object) -> tuple[Any, ...]:
        """Draw the network's scores of a class."""
        if kept is None or name not in kept.card.classes:
            return (gr.skip(),) * 2
        index = kept.card.classes.index(str(name))
        maps = kept.scores if kept.cams is None or index == 0 else kept.cams
        heat, peak = maps[index], float(maps[index].max())
        if maps is kept.cams:
            heat = heat / max(peak, 1e-6)
            told = (
                f"Class activation map of the classifier that taught this model from tags, as a part of its peak, "
                f"{peak:.2f}; the strongest class's is {float(maps[1:].max()):.2f}."
            )
        else:
            told = f"Highest score {peak:.2f}. The network's score of the class before refinement."
        return self._files.jpeg(tinted(kept.image, heat), f"{kept.name}_activation.jpg"), markup.note(told)

    def _nothing(self, message: str) -> tuple[Any, ...]:
        closed = None, gr.HTML(message, visible=True), gr.Column(visible=False), None, ""
        return *closed, None, "", gr.Dropdown(choices=[], value=None), None, ""
