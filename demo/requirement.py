"""Gradio, the one library that only the demo needs, and the libraries that would report to their makers."""

from __future__ import annotations

import os

from wsss_deploy.errors import WsssError

#: Read by gradio, by the hub client that it imports, and by onnxruntime (on Linux since 1.29) when they start.
NO_TELEMETRY = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}


def require_gradio() -> None:
    """Make sure that gradio can be imported, and that nothing that is loaded from now on sends anything anywhere.

    Raises:
        WsssError: It is not installed.
    """
    os.environ.update(NO_TELEMETRY)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise WsssError("the demo needs gradio, which is not installed; pip install 'wsss-deploy[demo]'") from error
