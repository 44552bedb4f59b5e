"""The web demo: `wsss-demo` starts it, `build_app` gives the page for another web application."""

from demo.app import build_app
from demo.segmenting import Limits

__all__ = ["Limits", "build_app"]
