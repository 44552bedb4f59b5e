"""The tab Train: start, watch, stop and resume runs; a finished one is exported and appears among the models."""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo import markup
from demo.charts import curves
from demo.files import PageFiles
from demo.folder import AnnotatedFolder
from demo.preview import Previews
from demo.runs import ACTIVE, MAX_ITERATIONS, NETWORKS, SUPERVISIONS, Runs, RunStatus, Settings
from demo.segment_tab import html
from wsss_deploy.errors import WsssError

#: What the tab is called.
TRAIN = "Train"
_SECONDS = 2.0


def only_while_watched(event: gr.SelectData) -> gr.Timer:
    """The timer's state for the tab that was opened: progress is asked for while it is looked at."""
    return gr.Timer(active=event.value == TRAIN)


def train_tab(folder: AnnotatedFolder, runs: Runs, files: PageFiles) -> tuple[Any, Any, Any, Any]:
    """Build the tab inside the current page.

    Returns:
        The timer, and the handler, inputs and outputs that bring the tab up to date.
    """
    handlers = _Handlers(folder, runs, files)
    html(markup.title("Train and export", "From the labels of this folder to a model that the tab Segment offers."))
    timer = gr.Timer(_SECONDS, active=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            progress = html(elem_id="train-labels")
            supervision = gr.Dropdown(
                list(SUPERVISIONS), value="auto", label="Learn from", elem_id="train-supervision",
                info="auto: the densest labels that each image has", filterable=False,
            )  # fmt: skip
            network = gr.Dropdown(
                list(NETWORKS), value=next(iter(NETWORKS)), label="Network", elem_id="train-network", filterable=False
            )
            iterations = gr.Number(
                500, label="Iterations", precision=0, minimum=1, maximum=MAX_ITERATIONS, elem_id="train-iterations"
            )
            start = gr.Button("Train", variant="primary", elem_id="train-start")
            message = html(elem_id="train-message")
        with gr.Column(scale=3, min_width=300):
            names = runs.names()
            chosen = gr.Dropdown(
                names, value=next(iter(names), None), label="Run", elem_id="train-run", filterable=False,
                visible=bool(names),
            )  # fmt: skip
            status = html(elem_id="train-status")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="train-stop", interactive=False)
                resume = gr.Button("Resume", elem_id="train-resume", interactive=False)
            chart = html(elem_id="train-chart", container=True, padding=True)
            preview = gr.Image(
                interactive=False, label="Prediction so far", elem_id="train-preview", buttons=["fullscreen"],
                visible=False,
            )  # fmt: skip
            listed = html(elem_id="train-runs")
    shown = [chosen, progress, status, chart, preview, listed, stop, resume]
    options: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
    timer.tick(handlers.show, chosen, shown, trigger_mode="once", **options)
    chosen.input(handlers.show, chosen, shown, **options)
    start.click(handlers.start, [supervision, network, iterations], [message, *shown], **options)
    stop.click(handlers.stop, chosen, [message, *shown], **options)
    resume.click(handlers.resume, chosen, [message, *shown], **options)
    return timer, handlers.show, chosen, shown


class _Handlers:
    def __init__(self, folder: AnnotatedFolder, runs: Runs, files: PageFiles) -> None:
        self._folder = folder
        self._runs = runs
        self._files = files
        self._previews = Previews()

    def start(self, supervision: Any, network: Any, iterations: Any) -> tuple[Any, ...]:
        """Queue a run with what the browser sent."""
        try:
            if not self._folder.labelled():
                raise WsssError("no image has labels yet; draw some in the tab Annotate")
            name = self._runs.start(Settings(supervision, network, iterations))
        except WsssError as error:
            return markup.problem(str(error), "Not started."), *self.show(None)
        return "", *self.show(name, select=True)

    def stop(self, name: object) -> tuple[Any, ...]:
        """Stop a run."""
        try:
            self._runs.stop(name)
        except WsssError as error:
            return markup.problem(str(error), "Not stopped."), *self.show(name)
        return "", *self.show(name)

    def resume(self, name: object) -> tuple[Any, ...]:
        """Queue a stopped run again."""
        try:
            self._runs.resume(name)
        except WsssError as error:
            return markup.problem(str(error), "Not resumed."), *self.show(name)
        return "", *self.show(name)

    def show(self, name: object, select: bool = False) -> tuple[Any, ...]:
        """The values of all outputs; a run that is not known means the newest one.

        The choice of the run stays as it is in the browser, unless `select`: an answer that was long under way would
        else take back what was chosen meanwhile.
        """
        states = self._runs.states()
        names = [known for known, _ in states]
        chosen = name if name in names else next(iter(names), None)
        labels = self._labels()
        run: RunStatus | None = None
        problem = ""
        choice: dict[str, Any] = {"value": chosen} if select or chosen != name else {}
        try:
            run = None if chosen is None else self._runs.status(chosen)
        except WsssError as error:
            problem = markup.problem(str(error), "")
        return (
            gr.Dropdown(choices=names, visible=bool(names), **choice),
            labels,
            problem if run is None else _origin(run) + markup.run_status(run),
            "" if run is None else self._charts(run),
            self._preview(run),
            markup.run_list(states),
            gr.Button(interactive=run is not None and run.state in ACTIVE - {"stopping"}),
            gr.Button(interactive=run is not None and run.state in ("stopped", "failed")),
        )

    def _labels(self) -> str:
        try:
            progress = self._folder.progress()
        except WsssError as error:
            return markup.problem(str(error), "")
        return markup.note(f"{progress.done} of {progress.total} images are annotated.")

    def _preview(self, run: RunStatus | None) -> Any:
        """What the run's network makes of the first image that can be read, preferably one without labels."""
        hidden = gr.Image(None, visible=False)
        if run is None or run.state not in ("training", "stopping", "stopped"):
            return hidden
        try:
            labelled = self._folder.labelled()
            names = sorted(self._folder.names, key=lambda name: name in labelled)
            images = [self._folder.path(name) for name in names]
            classes, palette = self._folder.classes, self._folder.palette
        except WsssError:
            return hidden
        preview = self._previews.show(self._runs.folder / run.name, images, classes, palette)
        if preview is None:
            return hidden
        picture = self._files.jpeg(preview.picture, f"{run.name}_{preview.iteration}.jpg")
        return gr.Image(picture, visible=True, label=f"Prediction after {preview.iteration} iterations: {preview.name}")

    @staticmethod
    def _charts(run: RunStatus) -> str:
        losses = {name.removeprefix("loss/"): points for name, points in run.curves.items() if name.startswith("loss/")}
        quality = {name: points for name, points in run.curves.items() if "miou" in name.lower()}
        drawn = curves(losses, run.settings.iterations, "Loss")
        return drawn + (curves(quality, run.settings.iterations, "Validation") if quality else "")


def _origin(run: RunStatus) -> str:
    """A remark on a run that this demo has not started."""
    if not run.elsewhere:
        return ""
    return markup.note("Started elsewhere: by another wsss-demo, or by one that has ended. Stop works here too.")
