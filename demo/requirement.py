"""Gradio, the one library that only the demo needs."""

from __future__ import annotations

import os

from wsss_deploy.errors import WsssError


def require_gradio() -> None:
    """Make sure that gradio can be imported, and that it sends nothing anywhere.

    Raises:
        WsssError: It is not installed.
    """
    # Gradio reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise WsssError("the demo needs gradio, which is not installed; pip install 'wsss-deploy[demo]'") from error
