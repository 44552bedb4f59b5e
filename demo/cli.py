"""wsss-demo: a page in the browser that segments images."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image

from demo.app import build_app
from demo.models import find_examples, find_model
from demo.requirement import require_gradio
from demo.server import is_loopback, listen, make_server
from wsss_deploy.cli.common import ArgumentParser, run_command
from wsss_deploy.errors import UsageError
from wsss_deploy.segmenter import Segmenter


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-demo`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-demo",
        "Segment images in the browser: overlay, legend, confidence, timing.",
        "The page is reachable from this machine only, unless --host says otherwise, and asks nothing of the network.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="model.onnx or model.pt (default: the one in this folder or in quickstart/)",
    )
    parser.add_argument("--port", type=_port, default=7860, metavar="N", help="0 takes a free one (default: 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these before showing the page")
    run_command(parser, _serve, argv)


def _serve(arguments: argparse.Namespace) -> None:
    auth = _credentials(arguments.auth)
    model = arguments.model or find_model(Path())
    with listen(arguments.host, arguments.port) as listener, tempfile.TemporaryDirectory(prefix="wsss-demo-") as cache:
        port = listener.getsockname()[1]
        # Uploads lie in a folder that only this user can read, and that goes when the command ends.
        os.environ["GRADIO_TEMP_DIR"] = cache
        require_gradio()
        segmenter = Segmenter(model)
        # The page has its own, lower limit; Pillow's warning about merely large images helps nobody here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        server = make_server(build_app(segmenter, find_examples(model)), arguments.host, auth)
        runtime = segmenter.describe()
        if not is_loopback(arguments.host):
            sys.stderr.write(_warning(arguments.host, auth is not None))
        sys.stdout.write(
            f"{model} in {runtime['backend']} {runtime['version']} on {runtime['device']}\n"
            f"Open {_address(arguments.host, port)} (Ctrl-C stops)\n"
        )
        sys.stdout.flush()
        # Ended by `kill`, it tidies up as after Ctrl-C; for a server, both are the normal end.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of the server is worth showing; that stopping cuts off the pages still open is meant."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "timeout graceful" not in record.getMessage()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is no port, expected a number from 0 to 65535")
    return int(text)


def _credentials(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise UsageError("--auth: expected USER:PASSWORD, both not empty")
    return user, password


def _address(host: str, port: int) -> str:
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warning(host: str, protected: bool) -> str:
    who = "and knows the password (it travels unencrypted)" if protected else "(no password is asked for, see --auth)"
    return f"warning: --host {host} lets everyone who reaches this machine {who} use the page and its processor\n"
