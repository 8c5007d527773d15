"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from kvpress_moe.benchmark.results import Results
from kvpress_moe.report.markdown import Table, facts

_STYLE = files("kvpress_moe.report").joinpath("page.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

#: The page may show its own style and images. It loads nothing, runs nothing and sends nothing.
_POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"


def page(results: Results, tables: Sequence[Table], plots: Sequence[tuple[str, str]], out: Path, reference: str) -> str:
    """The HTML text of the page. Plots (title, file name) are read from ``out`` and embedded."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>Benchmark of KV-cache presses</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Benchmark of KV-cache presses</h1><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(results)),
        "</dl>",
        _table(tables[0], reference),
    ]
    for title, name in plots:
        data = base64.b64encode((out / name).read_bytes()).decode()
        image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        parts.append(f'<figure><div class="scroll">{image}</div><figcaption>{escape(title)}</figcaption></figure>')
    parts += [_table(table, reference) for table in tables[1:]]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _table(table: Table, reference: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = []
    for row in table.rows:
        ours = ' class="ours"' if row[0] == reference else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        rows.append(f'<tr{ours}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    note = f"<p>{escape(table.note.replace('`', ''))}</p>" if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2>{note}<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )
