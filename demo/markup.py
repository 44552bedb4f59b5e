"""The page's own HTML: legend, timing, model card, messages. Every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from demo.colormap import css_gradient
from wsss_deploy.card import ModelCard, Protocol
from wsss_deploy.segmentation import ClassShare

if TYPE_CHECKING:
    from demo.runs import RunStatus

STAGES = {
    "pre": "Reading and resizing",
    "inference": "Network",
    "refinement": "Refinement",
    "post": "Scores to mask",
}
#: For gradio's own components: images in their own shape up to a height, room for an upload that is no image, room for
#: all tabs on a phone, and a chosen tab that can be read (its accent colour has too little contrast). An image that is
#: clicked is never shown enlarged: gradio's arithmetic of the place of a click knows shrinking only.
_PAGE_STYLE = """
:is(#upload, #overlay, #confidence, #why-upload, #why-pixel, #why-activation, #compare-upload, #compare-left,
  #compare-right, #compare-difference, #train-preview)
  :is(.image-frame, .upload-container, .image-container > button) {
  width: 100% !important; }
:is(#upload, #overlay, #confidence, #why-upload, #why-pixel, #why-activation, #compare-upload, #compare-left,
  #compare-right, #compare-difference, #train-preview)
  img { width: 100%; height: auto; min-height: 6rem; max-height: min(62vh, 560px);
  object-fit: contain; }
#why-pixel img { object-fit: scale-down !important; }
:is(#overlay, #confidence, #why-pixel, #why-activation, #compare-left, #compare-right, #compare-difference,
  #train-preview).fullscreen img {
  height: 100vh; max-height: none; }
@media (max-width: 600px) {
  #tabs .tab-container button { padding-inline: 0.4rem; font-size: 0.8rem; }
  .gradio-container > .main.app { padding-inline: 0.8rem; } }
[role=tab][aria-selected=true] { color: var(--body-text-color); }
"""
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch", "tensorrt": "TensorRT", "openvino": "OpenVINO"}


def header(card: ModelCard | None, runtime: Mapping[str, Any]) -> str:
    """Title of the tab Segment and what runs; None where no model can be used."""
    if card is None:
        return f"<style>{_PAGE_STYLE}</style>{title('Segment an image', 'No model yet.')}"
    return (
        f"<style>{_PAGE_STYLE}</style><h1>Segment an image</h1>"
        f"<p>Model <strong>{escape(card.name)}</strong>, {len(card.classes)} classes, "
        f"in {escape(_runtime(runtime))}</p>"
    )


def title(text: str, explanation: str) -> str:
    """Title of a tab."""
    return f"<h1>{escape(text)}</h1><p>{escape(explanation)}</p>"


def note(text: str) -> str:
    """A remark."""
    return f'<p class="note">{escape(text)}</p>'


def hint() -> str:
    """What stands where the result will be."""
    return '<p class="note" role="status">Upload, paste or choose an image. The result appears here.</p>'


def problem(message: str, lead: str = "Not segmented.") -> str:
    """A message about something that could not be done."""
    return f'<p class="note problem" role="alert"><strong>{escape(lead)}</strong> {escape(message)}</p>'


def legend(entries: Sequence[ClassShare]) -> str:
    """The classes that occur, with colour, share of the area and mean confidence."""
    rows = "".join(
        f'<tr><th scope="row"><span class="name">{_swatch(entry.color)}{escape(entry.name)}</span></th>'
        f'<td class="bar"><span style="width:{100 * entry.share:.2f}%;background:{_rgb(entry.color)}"></span></td>'
        f"<td>{_percent(entry.share)}</td><td>{entry.confidence:.2f}</td></tr>"
        for entry in entries
    )
    return (
        '<table><thead><tr><th scope="col">Class</th><td class="bar"></td><th scope="col">Area</th>'
        f'<th scope="col">Confidence</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def timing(milliseconds: Mapping[str, float], runtime: Mapping[str, Any], shape: tuple[int, int]) -> str:
    """What took how long, and where it really ran.

    Args:
        milliseconds: By stage.
        runtime: What `Segmenter.describe` says.
        shape: Height and width of the image.
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(STAGES.get(stage, stage))}</th><td>{value:.1f}</td></tr>'
        for stage, value in milliseconds.items()
    )
    total = sum(milliseconds.values())
    details = {
        "Runtime": _runtime(runtime),
        "Device": _device(runtime),
        "Precision": runtime.get("precision"),
        "Threads": runtime.get("threads"),
        "Image": f"{shape[1]} × {shape[0]} pixels",
    }
    return (
        f'<div class="columns"><table><thead><tr><th scope="col">Stage</th><th scope="col">ms</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><th scope="row">Total</th><td>{total:.1f}</td></tr></tfoot></table>'
        f"{pairs(details)}</div>"
    )


def scale() -> str:
    """The colours of the confidence map."""
    return (
        f'<div class="scale"><span>0</span><span class="colors" style="background:{css_gradient()}"></span>'
        "<span>1</span></div>"
    )


def model_card(card: ModelCard) -> str:
    """The card in words: classes, network, how it was trained."""
    chips = "".join(
        f'<li class="name">{_swatch(color)}{escape(name)}</li>'
        for name, color in zip(card.classes, card.palette, strict=True)
    )
    sizing = card.sizing
    if sizing.tile:
        size = f"own size, in windows of {sizing.tile} pixels"
    elif sizing.long_side:
        size = f"longer side resized to {sizing.long_side} pixels"
    else:
        size = f"own size up to {sizing.max_long_side} pixels"
    details = {
        "Network": f"{card.architecture.encoder}, decoder {card.architecture.decoder}",
        "Input": size,
        **(_protocol(card.protocol) if card.protocol else {"Training": "not recorded in this model"}),
        "Made with": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
    }
    return f'<ul class="chips">{chips}</ul>{pairs(details)}'


def _protocol(protocol: Protocol) -> dict[str, str]:
    simulated = " (simulated from masks)" if protocol.simulated else ""
    return {
        "Trained from": f"{', '.join(protocol.supervision)}{simulated}",
        "Method": protocol.method,
        "Data": f"{protocol.data}, {protocol.train_images} images",
        "Schedule": f"{protocol.iterations} iterations of {protocol.batch_size}, crops of {protocol.size} pixels",
        "Weights from": "random initialisation" if protocol.weights == "none" else protocol.weights,
        "Chosen by": protocol.selection,
        **{_title(name): f"{value:.4g}" for name, value in protocol.metrics.items()},
        **{_title(name): value for name, value in protocol.notes.items()},
    }


def _title(name: str) -> str:
    words = name.replace("_", " ").replace("miou", "mIoU")
    return words[:1].upper() + words[1:]


def _runtime(runtime: Mapping[str, Any]) -> str:
    name = str(runtime.get("backend", "unknown"))
    return f"{_RUNTIMES.get(name, name)} {runtime.get('version', '')} on {runtime.get('device', 'unknown')}"


def _device(runtime: Mapping[str, Any]) -> str:
    parts = [str(runtime.get("device_name") or runtime.get("device", "unknown")), *runtime.get("providers", ())]
    return ", ".join(parts)


def comparison(
    share: float,
    classes: Sequence[tuple[str, float]],
    models: Sequence[tuple[str, Mapping[str, float], Mapping[str, Any]]],
) -> str:
    """Agreement of two models and how long each took.

    Args:
        share: Pixels that agree, of all.
        classes: Intersection over union of the two by class name.
        models: Key, milliseconds by stage and what `Segmenter.describe` says of each.
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><span style="width:{100 * iou:.1f}%;background:#0d9488"></span></td><td>{iou:.3f}</td></tr>'
        for name, iou in classes
    )
    stages = dict.fromkeys(stage for _, milliseconds, _ in models for stage in milliseconds)
    times = "".join(
        f'<tr><th scope="row">{escape(STAGES.get(stage, stage))}</th>'
        + "".join(f"<td>{milliseconds.get(stage, 0.0):.1f}</td>" for _, milliseconds, _ in models)
        + "</tr>"
        for stage in stages
    )
    totals = "".join(f"<td>{sum(milliseconds.values()):.1f}</td>" for _, milliseconds, _ in models)
    names = {
        f"{place} model": f"{key}, {_runtime(runtime)}"
        for place, (key, _, runtime) in zip(("First", "Second"), models, strict=True)
    }
    return (
        f'<p class="figure"><strong>{100 * share:.2f} %</strong> of the pixels agree</p>'
        f'<table><thead><tr><th scope="col">Class</th><td class="bar"></td><th scope="col">IoU of the two</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>"
        f'<table><thead><tr><th scope="col">Stage, ms</th><th scope="col">First</th><th scope="col">Second</th></tr>'
        f'</thead><tbody>{times}</tbody><tfoot><tr><th scope="row">Total</th>{totals}</tr></tfoot></table>'
        f"{pairs(names)}"
    )


_STATES = {
    "queued": "waits for the run before it",
    "training": "is training",
    "exporting": "is being exported",
    "stopping": "stops after this step",
    "stopped": "is stopped",
    "failed": "has failed",
    "done": "is done: its model is offered in the tab Segment",
}


def run_status(run: RunStatus) -> str:
    """What a run is doing, how far it is, and what its commands said last."""
    total = run.settings.iterations
    role = ' class="note problem" role="alert"' if run.state == "failed" else ' class="note" role="status"'
    details = {
        "Learns from": run.settings.supervision,
        "Network": run.settings.network,
        "Last message": run.note,
    }
    if run.state == "training" and not run.iteration:
        # Before the first step libraries are loaded and labels made of tags or points, which can take minutes.
        steps = '<progress aria-label="Iterations"></progress> getting ready'
    else:
        steps = (
            f'<progress max="{total}" value="{min(run.iteration, total)}" aria-label="Iterations"></progress> '
            f"{run.iteration} of {total} iterations"
        )
    return (
        f"<p{role}><strong>{escape(run.name)}</strong> {_STATES[run.state]}.</p>"
        f'<p class="steps">{steps}</p>{pairs(details)}'
    )


def run_list(states: Sequence[tuple[str, str]]) -> str:
    """All runs with their states."""
    if not states:
        return note("No run yet.")
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(state)}</td></tr>' for name, state in states)
    head = '<thead><tr><th scope="col">Run</th><th scope="col">State</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def pairs(details: Mapping[str, object]) -> str:
    """Names and values, one below the other; empty values are left out."""
    shown: Iterable[tuple[str, str]] = ((name, str(value)) for name, value in details.items() if value)
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in shown)}</dl>"


def _swatch(color: Sequence[int]) -> str:
    return f'<span class="swatch" style="background:{_rgb(color)}"></span>'


def _rgb(color: Sequence[int]) -> str:
    return f"rgb({color[0]},{color[1]},{color[2]})"


def _percent(share: float) -> str:
    return "&lt;0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


#: For all of the above; colours are those of gradio's theme, so that light and dark both fit.
STYLE = """
h1 { font-size: 1.5rem; font-weight: 650; margin: 0; color: var(--body-text-color); }
p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
p strong { color: var(--body-text-color); font-weight: 600; }
.note { margin: 0; padding: 0.85rem 1rem; border: 1px dashed var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); overflow-wrap: anywhere; }
.problem { border: 1px solid var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color); }
.problem strong { color: inherit; }
table { border-collapse: collapse; border: 0; width: 100%; margin: 0; font-size: 0.92rem;
  color: var(--body-text-color); }
th, td { padding: 0.38rem 0.5rem; border: 0; border-bottom: 1px solid var(--border-color-primary);
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; background: none; }
th { font-weight: 500; }
thead th { font-size: 0.82rem; color: var(--body-text-color-subdued); }
tr > :first-child { text-align: left; padding-left: 0; }
tr > :last-child { padding-right: 0; }
th[scope="row"] { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tfoot th, tfoot td { font-weight: 650; border-bottom: 0; }
tbody:last-child tr:last-child > * { border-bottom: 0; }
.bar { width: 45%; }
.bar span { display: block; height: 0.6rem; min-width: 2px; border-radius: 3px;
  box-shadow: inset 0 0 0 1px rgba(128, 128, 128, 0.55); }
.name { display: inline-flex; align-items: center; gap: 0.5rem; overflow-wrap: anywhere; }
.swatch { flex: none; width: 0.95rem; height: 0.95rem; border-radius: 4px;
  box-shadow: inset 0 0 0 1px rgba(128, 128, 128, 0.55); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.5rem 2rem;
  align-items: start; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1rem; margin: 0.35rem 0; font-size: 0.92rem; }
dt { color: var(--body-text-color-subdued); }
dd { margin: 0; color: var(--body-text-color); overflow-wrap: anywhere; }
.chips { display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1.1rem; margin: 0 0 0.75rem; padding: 0;
  list-style: none; font-size: 0.92rem; color: var(--body-text-color); }
.chips li { margin: 0; }
.figure strong { font-size: 1.4rem; }
table + table { margin-top: 1rem; }
.steps { display: flex; align-items: center; gap: 0.75rem; margin: 0.6rem 0; color: var(--body-text-color);
  font-variant-numeric: tabular-nums; }
progress { flex: 1; max-width: 20rem; height: 0.6rem; appearance: none; border: 0; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }
progress::-webkit-progress-bar { background: none; }
progress::-webkit-progress-value { background: #0f766e; }
progress::-moz-progress-bar { background: #0f766e; }
.chart { margin: 0 0 0.5rem; color: var(--body-text-color); }
.chart figcaption { font-size: 0.92rem; font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; margin: 0.3rem 0; }
.chart text { font-size: 12px; fill: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.chart .chips { margin: 0; }
.scale { display: flex; align-items: center; gap: 0.6rem; font-size: 0.85rem; color: var(--body-text-color-subdued); }
.colors { flex: 1; height: 0.7rem; border-radius: 4px; }
@media (max-width: 600px) { .bar { display: none; } .chart text { font-size: 22px; } }
"""
