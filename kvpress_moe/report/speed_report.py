"""Tables, plots and growth of what `bench speed` measured, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvpress_moe.benchmark.speed import KVZIP, NONE, OURS, Row
from kvpress_moe.files import write_atomically


def growth(rows: Sequence[Row], name: str) -> dict[str, tuple[float, float]]:
    """
    How time and extra memory of a press grow with the prompt's length.

    Slope and R² of a straight line on a double logarithmic scale, for ``"seconds"`` inside the press and for
    ``"bytes"``. A slope of 1 is linear growth. A quantity is left out if there are fewer than three lengths, or if a
    value is not positive.
    """
    of_name = [row for row in rows if row.what == "prefill" and row.name == name and row.batch == 1]
    measured: dict[str, list[tuple[int, float]]] = {
        "seconds": [(row.tokens, row.in_press or 0.0) for row in of_name],
        "bytes": [(row.tokens, row.extra_peak_bytes) for row in of_name],
    }
    return {
        what: _line(points)
        for what, points in measured.items()
        if len(points) >= 3 and min(cost for _, cost in points) > 0
    }


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    x, y = torch.tensor(points, dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item(), ((x @ y) ** 2 / ((x @ x) * (y @ y))).item()


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """All facts and rows as plain data."""
    return {**about, "rows": [asdict(row) for row in rows]}


def markdown(rows: Sequence[Row]) -> str:
    """For each length and batch two tables: prefills and decoding."""
    lines = []
    for (tokens, batch), of_setting in _by_setting(rows).items():
        full = next((row.extra_peak_bytes for row in of_setting if row.what == "decode" and row.name == "full"), 0)
        lines += ["", f"### {tokens:,} tokens, batch {batch}", ""]
        lines += [
            "| prefill with | seconds (spread) | to no press | in the press | extra peak memory | of the full cache |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        base = next((row.seconds for row in of_setting if row.name == NONE), None)
        for row in of_setting:
            if row.what == "decode":
                continue
            spread = f"{row.seconds:.3f} ({row.fastest:.3f} to {row.slowest:.3f})"
            cells = [row.name, spread, f"{row.ratio:.3f}"]
            cells += [f"{row.in_press / base:.1%}" if row.in_press is not None and base else ""]
            counted = row.what == "prefill" and full
            cells += (
                [f"{row.extra_peak_bytes / 2**20:.1f} MiB", f"{row.extra_peak_bytes / full:.0%}"]
                if counted
                else [""] * 2
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| cache left | ms per token (spread) | to the full cache | MiB |", "|---|---|---|---|"]
        for row in of_setting:
            if row.what == "decode":
                spread = f"{1000 * row.seconds:.1f} ({1000 * row.fastest:.1f} to {1000 * row.slowest:.1f})"
                lines.append(f"| {row.name} | {spread} | {row.ratio:.3f} | {row.extra_peak_bytes / 2**20:.1f} |")
    return "\n".join(lines).strip() + "\n"


def _by_setting(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.tokens, row.batch), []).append(row)
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot prefill time (no press = 1) and extra peak memory over the length, for the smallest batch, as PNG."""
    from kvpress_moe.report.figures.style import COLOURS, MARKERS, Plot

    figure = Plot(9, 4)
    times, memory = figure.subplots(1, 2)
    batch = min(row.batch for row in rows)
    names = [name for name in dict.fromkeys(row.name for row in rows if row.what == "prefill") if name != NONE]
    for number, name in enumerate(names):
        of_name = [row for row in rows if row.what == "prefill" and row.name == name and row.batch == batch]
        lengths = [row.tokens for row in of_name]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        style |= {"linestyle": "-", "linewidth": 2} if name in OURS else {"linestyle": ":", "linewidth": 1}
        times.plot(lengths, [row.ratio for row in of_name], label=name, **style)
        memory.plot(lengths, [row.extra_peak_bytes / 2**20 for row in of_name], **style)
    times.axhline(1, color="#555555", linewidth=1)
    shown = [row.ratio for row in rows if row.what == "prefill" and row.name != KVZIP]
    times.set_ylim(min(shown) - 0.03, max(shown) + 0.03)  # without KVzip's time, several times the prefill
    times.set_ylabel("prefill time over that of no press")
    memory.set_ylabel("extra peak memory, MiB")
    for axis in (times, memory):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"tokens, batch {batch}")
        axis.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
