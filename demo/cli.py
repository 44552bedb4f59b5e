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
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from PIL import Image

from demo.app import build_app
from demo.models import STARTER, find_examples, find_model, models_beside
from demo.requirement import require_gradio
from demo.server import is_loopback, listen, make_server
from wsss_deploy.backends import RUNTIMES
from wsss_deploy.cli.common import MODEL_FILES, ArgumentParser, run_command
from wsss_deploy.errors import UsageError


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `wsss-demo`.

    Args:
        argv: Arguments without the program's name; None takes them from the process.
    """
    parser = ArgumentParser(
        "wsss-demo",
        "Segment images in the browser; with --data, annotate a folder of images and train on it, too.",
        "The page is reachable from this machine only, unless --host says otherwise, and asks nothing of the network.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help=f"{MODEL_FILES}, or a folder that holds some; others beside it are offered (default: this folder "
        "or quickstart/, else a small network for drawn scenes that comes with the package)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="annotate the images in DIR/images and train on them, in the browser"
    )
    parser.add_argument("--port", type=_port, default=7860, metavar="N", help="0 takes a free one (default: 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these before showing the page")
    run_command(parser, _serve, argv)


def _serve(arguments: argparse.Namespace) -> None:
    auth = _credentials(arguments.auth)
    if arguments.data is not None and auth is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--data with --host {arguments.host}: everyone who reaches this machine could change labels and start "
            "training; add --auth USER:PASSWORD"
        )
    models = _models(arguments.model, arguments.data)
    with (
        listen(arguments.host, arguments.port) as listener,
        tempfile.TemporaryDirectory(prefix="wsss-demo-") as cache,
        ExitStack() as ending,
    ):
        port = listener.getsockname()[1]
        # Uploads lie in a folder that only this user can read, and that goes when the command ends.
        os.environ["GRADIO_TEMP_DIR"] = cache
        require_gradio()
        # The page has its own, lower limit; Pillow's warning about merely large images helps nobody here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # Ended by `kill`, it tidies up as after Ctrl-C; for a server, both are the normal end.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page = build_app(models, find_examples(models[0]) if models else [], data=arguments.data)
        if arguments.data is not None:
            ending.callback(page.runs.close)
        server = make_server(page, arguments.host, auth)
        if not is_loopback(arguments.host):
            sys.stderr.write(_warning(arguments.host, auth is not None))
        what = _what(models, arguments.data)
        sys.stdout.write(f"{what}\nOpen {_address(arguments.host, port)} (Ctrl-C stops)\n")
        sys.stdout.flush()
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")


def _models(model: Path | None, data: Path | None) -> list[Path]:
    """The model to open first, and those beside it; none where the folder to annotate has models of its own."""
    if model is not None and model.is_dir():
        found = find_model(model) or next(iter(models_beside(model / "model")), None)
        if found is None:
            raise UsageError(f"{model}: holds no model; expected {' or '.join(f'*{suffix}' for suffix in RUNTIMES)}")
        model = found
    model = model or find_model(Path())
    if model is None:
        if data is not None and any((data / "runs").glob("run-*/model.*")):
            return []
        model = STARTER
    return [model, *models_beside(model)]


def _what(models: Sequence[Path], data: Path | None) -> str:
    parts = []
    if models:
        others = f" and {len(models) - 1} beside it" if len(models) > 1 else ""
        name = "the small network for drawn scenes that comes with wsss-deploy" if models[0] == STARTER else models[0]
        parts.append(f"{name}{others}, in {RUNTIMES[models[0].suffix.lower()]}")
    if data is not None:
        parts.append(f"annotating {data}")
    return ", ".join(parts)


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
