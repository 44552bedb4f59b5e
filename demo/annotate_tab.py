"""The tab Annotate: strokes, points and tags on the images of the folder.

It is a component of its own: gradio's image editor smooths its strokes, and what it gives back are colours of a scaled
picture, from which class ids cannot be read exactly.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from demo import markup
from demo.annotating import Annotating
from demo.folder import AnnotatedFolder
from demo.registry import Models
from demo.segment_tab import html as heading

_ASSETS = Path(__file__).parent / "assets"


def annotate_tab(folder: AnnotatedFolder, models: Models) -> None:
    """Build the tab inside the current page."""
    html, css, script = (
        (_ASSETS / f"annotate.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    heading(markup.title("Annotate", "Every stroke is saved at once, in the layout that wsss-train reads."))
    gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=script,
        apply_default_css=False,
        server_functions=Annotating(folder, models).functions(),
        elem_id="annotate",
    )
