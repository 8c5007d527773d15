"""The command kvpress-moe: one file per subcommand. torch is imported inside the commands, so --help is fast."""

from __future__ import annotations

import os
import sys

import typer

from kvpress_moe import __version__
from kvpress_moe.cli import ask, bench, compress, explore, report, speed, train
from kvpress_moe.errors import KVPressMoEError

app = typer.Typer(
    name="kvpress-moe",
    help="A mixture-of-experts router that decides what a KV cache keeps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=ask.EPILOG)(ask.ask)
app.command(epilog=compress.EPILOG)(compress.compress)
app.command(epilog=explore.EPILOG)(explore.explore)
benchmarks = typer.Typer()
benchmarks.callback(invoke_without_command=True, epilog=bench.EPILOG)(bench.bench)
benchmarks.command(epilog=speed.EPILOG)(speed.speed)
app.add_typer(benchmarks, name="bench")
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=train.EPILOG)(train.train)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpress-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """A mixture-of-experts router that decides what a KV cache keeps."""


def main() -> None:
    """Entry point. An error that this package raises on purpose is printed as one line; the exit status is then 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the commands have their own progress bars
    try:
        app()
    except KVPressMoEError as error:
        typer.echo(f"kvpress-moe: error: {error}", err=True)
        sys.exit(2)
