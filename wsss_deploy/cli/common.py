"""What all commands share: argument errors in one line, exit statuses, logging and `--debug`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from wsss_deploy.errors import WsssError
from wsss_deploy.text import visible

#: What every command takes that runs a model; not a list of suffixes, since `model.pt` is how a user knows the file.
MODEL_FILES = "model.pt, model.onnx, model.engine or model.xml"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM where the work can be gone on with; its text says how."""


def seed_number(text: str) -> int:
    """The type of `--seed`: a whole number from 0 to 2^32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed, expected a whole number from 0 to {2**32 - 1}")
    return int(text)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors take two lines and exit with status 2."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error and debug messages")

    def add_refinement(self) -> None:
        """Add `--refine` and `--no-refine`; without either, `refine` is None."""
        self.add_argument(
            "--refine",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="refine scores along the image's edges, or not (default: as the model's card says)",
        )

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is to be had, then exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def run_command(
    parser: ArgumentParser,
    command: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse, run and exit: 0 (or what `command` returns), 1 for bad input, 2 for bad usage, 130 for Ctrl-C.

    Args:
        parser: The command's parser.
        command: Called with the parsed arguments; returns an exit status or None for 0.
        argv: Arguments without the program's name; None takes them from the process.
    """
    arguments = parser.parse_args(argv)
    # Third-party chatter is not for the user of a command; our own messages are.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("wsss_deploy", "training", "export", "demo"):
        logging.getLogger(name).setLevel(logging.DEBUG if arguments.debug else logging.INFO)
    # Images beyond Pillow's limit are refused with our own error; its warning about merely large ones helps nobody.
    warnings.filterwarnings("ignore", category=Warning, message="Image size .* exceeds limit")
    try:
        status = command(arguments)
    except WsssError as error:
        if arguments.debug:
            raise
        # It may quote a file of a stranger, whose control characters are not for the terminal.
        sys.stderr.write(f"{parser.prog}: {visible(str(error))}\n")
        status = error.exit_status
    except KeyboardInterrupt as interruption:
        if arguments.debug:
            raise
        advice = f"; {interruption}" if isinstance(interruption, Interrupted) else ""
        sys.stderr.write(f"{parser.prog}: interrupted{advice}\n")
        status = 130
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing more can be said to it, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        if arguments.debug:
            raise
        sys.stderr.write(
            _bad_card(parser.prog, error)
            or f"{parser.prog}: unexpected {type(error).__name__}: {visible(str(error))}\n"
            "This is a defect of wsss-deploy; run again with --debug to see where it happened.\n"
        )
        status = 1
    sys.exit(status or 0)


def _bad_card(prog: str, error: Exception) -> str | None:
    """What is told of values of a user that no card may have, for example class names; None of other errors."""
    from wsss_deploy.card import problems

    title = getattr(error, "title", None)
    return f"{prog}: the model's card cannot be made: {problems(error)}\n" if title == "ModelCard" else None
