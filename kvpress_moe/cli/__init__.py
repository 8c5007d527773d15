"""The command kvpress-moe: one file per subcommand. torch is imported inside the commands, so --help is fast."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import typer

from kvpress_moe import __version__
from kvpress_moe.cli import ask, bench, calibrate, compress, explore, report, serve, speed, train
from kvpress_moe.cli.command import Command, Group
from kvpress_moe.errors import KVPressMoEError, WriteError

app = typer.Typer(
    name="kvpress-moe",
    help="A mixture-of-experts router that decides what a KV cache keeps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=Command, epilog=ask.EPILOG)(ask.ask)
app.command(cls=Command, epilog=compress.EPILOG)(compress.compress)
app.command(cls=Command, epilog=explore.EPILOG)(explore.explore)
benchmarks = typer.Typer(cls=Group)
benchmarks.callback(invoke_without_command=True, epilog=bench.EPILOG)(bench.bench)
benchmarks.command(cls=Command, epilog=speed.EPILOG)(speed.speed)
app.add_typer(benchmarks, name="bench")
app.command(cls=Command, epilog=report.EPILOG)(report.report)
app.command(cls=Command, epilog=train.EPILOG)(train.train)
app.command(cls=Command, epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command(cls=Command, epilog=serve.EPILOG)(serve.serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpress-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """A mixture-of-experts router that decides what a KV cache keeps."""


_NO_SPACE = (
    "standard output: cannot be written, expected a place with free space. Free some space, or write to another file."
)


def main() -> None:
    """
    Entry point.

    A wrong option, or an error that this package raises on purpose, is printed as one line. The exit status is then 2.
    After Ctrl-C it is 130. If nobody reads the output any more, the command ends quietly with status 1.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the commands have their own progress bars
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal cannot show
    try:
        try:
            status = app(standalone_mode=False)
        finally:
            _flush_output()
    except BrokenPipeError:
        status = 1
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except KVPressMoEError as error:
        typer.echo(f"kvpress-moe: error: {error}", err=True)
        status = 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        typer.echo(f"kvpress-moe: error: {_NO_SPACE}", err=True)
        status = 2
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        status = _print_usage_error(error)
    sys.exit(status)


def _flush_output() -> None:
    """Write what is left of the output. Raises BrokenPipeError or WriteError."""
    if sys.stdout is None:  # closed before the command began
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries once more when it ends
        if isinstance(error, BrokenPipeError):
            raise
        raise WriteError(_NO_SPACE) from error


def _print_usage_error(error: Any) -> int:
    """Print what the parser of the command line says, as one line. Returns the exit status."""
    message, context = " ".join(error.format_message().split()), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        see = f"{context.command_path} --help" if context is not None else "kvpress-moe --help"
        typer.echo(f"kvpress-moe: error: {message.rstrip('.')}. See {see}.", err=True)
    return int(error.exit_code)
