"""Serving the page from a process of its own."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from demo.requirement import require_gradio
from demo.segmenting import Limits
from wsss_deploy.errors import UsageError, WsssError

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before the model is loaded, so that a taken one is known at once.

    Args:
        host: Address or name of a network interface of this machine.
        port: 0 takes any free one.

    Raises:
        UsageError: The host is none of this machine.
        WsssError: The port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(
                f"--host {host}: is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all"
            ) from error
        reason = {
            errno.EADDRINUSE: "is in use by another program, perhaps an earlier wsss-demo; stop it or",
            errno.EACCES: "needs rights that this user lacks;",
        }.get(error.errno or 0, f"cannot be used ({error.strerror});")
        raise WsssError(
            f"port {port} on {host} {reason} choose another with --port N (0 takes any free one)"
        ) from error
    return listener


def make_server(
    page: gr.Blocks, host: str, auth: tuple[str, str] | None = None, limits: Limits | None = None
) -> uvicorn.Server:
    """A server for the page; `run(sockets=[...])` serves until it is interrupted or `should_exit` is set.

    Args:
        page: What `build_app` gave.
        host: Where it will listen; on the loopback, requests that name another host are refused.
        auth: User and password that the page asks for.
        limits: As given to `build_app`; None takes the defaults.
    """
    require_gradio()
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        auth=auth,
        max_file_size=(limits or Limits()).max_bytes,
        theme=_theme(),
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        # Everything that an environment variable could switch on is named, so that none can.
        root_path="",
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
    )
    if is_loopback(host):
        # A web page elsewhere could point its own name at 127.0.0.1 and so read what this page shows (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "::1", "[::1]", host])
        # And it could send requests of its own here, without reading the answers: that would do to start a training.
        app.add_middleware(_OwnPageOnly)
    # Open pages hold a connection for as long as they are open; stopping does not wait for them.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


class _OwnPageOnly:
    """Refuses what a web page from elsewhere sends: browsers name the sender's origin in every such request.

    Args:
        app: What answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin")
            if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
                from starlette.responses import PlainTextResponse

                await PlainTextResponse("this request comes from another page", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _theme() -> gr.themes.ThemeClass:
    """Gradio's default with the system's own fonts: those of other themes come from the network."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # The defaults are too pale to be read: grey on white, and white on the button.
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )
