"""The command line as tests see it. Refusals are taken from exceptions: what a terminal shows wraps at its width."""

from typer.testing import CliRunner, Result

from server.cli import app


def run(*arguments: object) -> Result:
    """One command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    """Why a command is not carried out, usage errors included."""
    error = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False).exception
    assert error is not None, "the command was carried out"
    return error.format_message() if hasattr(error, "format_message") else str(error)
