"""The report of benchmark runs, made only from their records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kvpress_moe.benchmark.results import best_of_ours, load
from kvpress_moe.errors import SettingError
from kvpress_moe.files import write_atomically
from kvpress_moe.report.html_page import page
from kvpress_moe.report.markdown import markdown, tables


def write_report(
    runs: Sequence[Path],
    out: Path,
    ours: str | None = None,
    tasks: Sequence[str] | None = None,
    members: Sequence[str] = (),
) -> list[Path]:
    """
    Write ``report.md``, plots and ``report.html``.

    Parameters
    ----------
    runs : sequence of Path
        Directories that `kvpress-moe bench` wrote. Model, seed and setting must be the same.
    out : Path
        Directory of the report; created if it does not exist.
    ours : str, optional
        The method that the others are compared with. Default: the best method of the group "ours".
    tasks : sequence of str, optional
        Use only the records of these tasks.
    members : sequence of str
        Methods for an additional oracle row: for each task the best of them, known in hindsight.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    SettingError
        If the records cannot be read or do not belong together, or matplotlib is not installed.
    """
    results = load(runs, tasks)
    reference = ours or best_of_ours(results)
    if reference not in results.methods:
        raise SettingError("ours", reference, f"one of {', '.join(results.methods)}", "")
    for member in members:
        if member not in results.methods:
            raise SettingError("members", member, f"some of {', '.join(results.methods)}", "")
    results.members = tuple(members)
    try:
        from kvpress_moe.report.figures.benchmark import draw

        out.mkdir(parents=True, exist_ok=True)
        plots = draw(results, reference, out)
    except ImportError as error:
        raise SettingError("report", "plots", "the package matplotlib", "pip install kvpress-moe[bench]") from error
    found = tables(results, reference)
    texts = {
        "report.md": markdown(results, found, plots),
        "report.html": page(results, found, plots, out, reference),
    }
    for name, text in texts.items():
        write_atomically(out / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return [out / name for name in (*texts, *(name for _, name in plots))]
