"""The page: its tabs, and what moves between them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.folder import AnnotatedFolder
from demo.registry import Models
from demo.requirement import require_gradio
from demo.runs import Runs
from demo.segmenting import Limits

if TYPE_CHECKING:
    from demo.guard import GuardedBlocks
    from wsss_deploy.segmenter import Segmenter

#: Files that the page made are looked through this often and deleted at this age, in seconds.
_CACHE_CHECK, _CACHE_AGE = 600, 3600
_SCRIPTS = tuple(Path(__file__).parent / "assets" / name for name in ("names.js", "paste.js"))


def build_app(
    model: Segmenter | Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    examples: Sequence[str | os.PathLike[str]] = (),
    limits: Limits | None = None,
    data: str | os.PathLike[str] | None = None,
) -> GuardedBlocks:
    """Build the page.

    Serve it with `demo.server.make_server`, or mount it into a FastAPI application with
    `gradio.mount_gradio_app(app, page, path="/segment")`. Visitors share the models, and with `data` the folder that
    they annotate: what one of them has uploaded lives in the gradio session of that page view.

    Args:
        model: A model that is open, used from several threads; or one or several model files, opened when they are
            chosen, the first at once.
        examples: Images that are offered to be clicked.
        limits: What the page accepts; None takes the defaults.
        data: A folder with `images/` that everybody who reaches the page may annotate and train on; None leaves these
            tabs out. `page.runs.close()` stops what trains.

    Returns:
        A `gradio.Blocks`, not started.

    Raises:
        WsssError: Gradio is not installed, a model cannot be opened, or the folder holds no images.
    """
    require_gradio()
    import gradio as gr

    from demo.annotate_tab import annotate_tab
    from demo.compare_tab import compare_tab
    from demo.files import PageFiles
    from demo.guard import GuardedBlocks
    from demo.segment_tab import listing, segment_tab
    from demo.train_tab import TRAIN, only_while_watched, train_tab
    from demo.why_tab import why_tab

    limits = limits or Limits()
    folder = None if data is None else AnnotatedFolder(Path(data))
    runs = None if folder is None else Runs(folder.root)
    models = _models(model, runs)
    page = GuardedBlocks(title=_title(models), analytics_enabled=False, delete_cache=(_CACHE_CHECK, _CACHE_AGE))
    with page:
        files = PageFiles(Path(page.GRADIO_CACHE))
        lists: list[Any] = []
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Segment", id="segment") as segment:
                offered = [os.fspath(example) for example in examples]
                upload, choice = segment_tab(page, models, offered, limits, files)
                lists.append((segment, [choice]))
            with gr.Tab("Why", id="why") as why:
                why_upload, choice = why_tab(models, limits, files)
                lists.append((why, [choice]))
            with gr.Tab("Compare", id="compare") as comparison:
                compare_upload, first, second = compare_tab(models, limits, files)
                lists.append((comparison, [first, second]))
            if folder is not None and runs is not None:
                with gr.Tab("Annotate", id="annotate-tab"):
                    annotate_tab(folder, models)
                with gr.Tab(TRAIN, id="train-tab") as train:
                    timer, show, run, shown = train_tab(folder, runs, files)
        # The image that was brought to the first tab is there in the others, too; nothing goes over the network.
        for tab, own in ((why, why_upload), (comparison, compare_upload)):
            tab.select(None, [own, upload], own, js="(own, first) => own ?? first", api_visibility="private")
        for script in _SCRIPTS:
            page.load(None, js=script.read_text(encoding="utf-8"), api_visibility="private")
        if runs is not None:
            quiet: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
            refresh = listing(models)
            for tab, choices in lists:
                for each in choices:
                    tab.select(refresh, each, each, **quiet)
            for each in [each for _, choices in lists for each in choices]:
                page.load(refresh, each, each, **quiet)
        if runs is not None:
            page.runs = runs
            # One handler for all tabs, one call at a time, none left out: the tab that was opened last decides.
            tabs.select(only_while_watched, None, timer, trigger_mode="multiple", concurrency_limit=1, **quiet)
            train.select(show, run, shown, **quiet)
    page.queue(max_size=limits.queue, default_concurrency_limit=4, api_open=False)
    page.state_session_capacity = limits.sessions
    return page


def _models(model: Any, runs: Runs | None) -> Models:
    """What was given as models."""
    folder = None if runs is None else runs.folder
    if model is None:
        return Models(runs=folder)
    if isinstance(model, str | os.PathLike):
        model = [model]
    if not isinstance(model, Sequence):
        return Models(given=model, runs=folder)
    models = Models(files=[Path(path) for path in model], runs=folder)
    models.open(models.default())
    return models


def _title(models: Models) -> str:
    key = models.default()
    return "wsss-deploy" if key is None else f"{models.open(key).card.name}: segment an image"
