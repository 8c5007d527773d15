"""kvpress-moe report: tables, plots and a page from the records of benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvpress_moe.cli.options import check_out_directory, split_names

EPILOG = """Examples:

kvpress-moe report runs/quick

kvpress-moe report runs/first runs/second --out results --ours moe

kvpress-moe report runs/full --tasks variable_tracking,code --out runs/held-out
"""


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories that `bench` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the report. Default: the first run's.")] = None,
    ours: Annotated[
        str | None, typer.Option(help="Compare the others with this method. Default: the best of the group ours.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    members: Annotated[
        str | None, typer.Option(help="Methods, separated by commas. A row shows the best of them for each task.")
    ] = None,
) -> None:
    """
    Write report.md, plots and report.html (one self-contained page) from the records.
    """
    if out is not None:
        check_out_directory(out)

    from kvpress_moe.report.benchmark_report import write_report

    written = write_report(
        runs, out or runs[0], ours, split_names("tasks", tasks), split_names("members", members) or ()
    )
    print(json.dumps({"written": [str(path) for path in written]}, separators=(",", ":")))
