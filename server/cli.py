"""The command line, ``dovetail``. One file a command in ``server.commands``; ``--help`` imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import Annotated, NoReturn

import typer

from server.commands import bench, evaluate, study, train
from server.commands.convert import convert
from server.commands.doctor import doctor
from server.commands.export import export
from server.commands.generate import generate
from server.commands.plan import plan
from server.commands.predict import DetectCommand, FaceQualityCommand, KindCommand, detect, face_quality, predict
from server.commands.serve import serve
from server.engine.request import EngineError
from server.installation import check_installation, own_version
from server.settings import LOADING_THREAD, SettingsError

logger = logging.getLogger(__name__)

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="dovetail",
    help="Exact, faster answers from language models that do not fit your GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(generate)
app.command(cls=KindCommand)(predict)
app.command(cls=DetectCommand)(detect)
app.command("face-quality", cls=FaceQualityCommand)(face_quality)
app.command()(convert)
app.add_typer(bench.app, name="bench")
app.command()(plan)
app.command()(doctor)
app.add_typer(train.app, name="train")
app.add_typer(study.app, name="study")
app.add_typer(evaluate.app, name="eval")
app.command()(export)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(f"dovetail {own_version()}")
        raise typer.Exit


@app.callback()
def set_up(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every step, and tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Handlers are set up here and nowhere else; logs go to stderr."""
    del version  # its callback has printed it
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    check_installation()


def main() -> None:
    """The console script. Exit codes: 0 fine, 1 failed, 2 usage, 130 Ctrl-C or SIGTERM. An error that has a type is one
    line.
    """
    open_standard_streams()
    hear_signals()
    try:
        app()
        exit_code = FINE
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else FAILED
        if exit_code == INTERRUPTED:
            complain("interrupted")
    except SettingsError as error:
        exit_code = fail(error, USAGE)
    except (ValueError, OSError, ImportError, EngineError) as error:
        exit_code = fail(error, FAILED)
    leave(exit_code)


def open_standard_streams() -> None:
    """Where the process was started with closed standard streams, the next file or connection would take their
    numbers, and what native code prints would go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def hear_signals() -> None:
    """SIGTERM ends a command as Ctrl-C does, so that what is done is kept. Both are heard also where the command was
    started to ignore them, as shells start what runs in the background; a server replaces them by its own.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def fail(error: Exception, exit_code: int) -> int:
    """One line on stderr; the traceback only with --verbose."""
    logger.debug("the command failed", exc_info=error)
    complain(str(error))
    return exit_code


def complain(message: str) -> None:
    """One line on stderr, if there is one."""
    with contextlib.suppress(OSError, AttributeError):  # closed, full, or absent
        sys.stderr.write(f"dovetail: {message}\n")


def leave(exit_code: int) -> NoReturn:
    """End the process. A thread that still loads a model is in native code, where the usual teardown would abort."""
    if any(thread.name == LOADING_THREAD for thread in threading.enumerate()):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError, ValueError):
                stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
