"""Plots of the report, as PNG files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from kvpress_moe.benchmark.results import Results, best_single, ranked
from kvpress_moe.files import write_atomically
from kvpress_moe.report.figures.byte_shares import over_bytes
from kvpress_moe.report.figures.ratios import over_ratio, shown
from kvpress_moe.report.figures.style import NORMAL, SMALL, Plot, heat_map, label


def draw(results: Results, reference: str, out: Path) -> list[tuple[str, str]]:
    """Draw all plots. Returns their (title, file name)."""
    scores = over_ratio(results, "score", shown(results, reference), by_task=True)
    removed = "bytes removed" if results.header.get("by_bytes") else "pairs evicted"
    title = f"Task score over the share of {removed}; grey: all other methods"
    drawn = [_save(scores, out, "score.png", title), _heat_map(results, out)]
    if results.header.get("by_bytes"):
        title = "KL to the full cache over the share of a 16-bit cache's bytes; both scales are logarithmic"
        drawn.insert(0, _save(over_bytes(results), out, "kl_over_bytes.png", title))
    needles = _needles(results, reference, out)
    return drawn + ([needles] if needles else [])


def _heat_map(results: Results, out: Path) -> tuple[str, str]:
    ratio = results.ratios[len(results.ratios) // 2]
    order = ranked(results)
    grid = np.full((len(order), len(results.tasks)), np.nan)
    for row, method in enumerate(order):
        for column, task in enumerate(results.tasks):
            values = results.by_task((method, ratio), "kl").get(task)
            grid[row, column] = np.nan if values is None else values.mean()
    figure = Plot(2.8 + 0.62 * len(results.tasks), 1.4 + 0.24 * len(order))
    axis = figure.add_subplot()
    image = heat_map(axis, grid, LogNorm(1e-3, 3, clip=True), "cividis_r", spec=".2g")
    axis.set_xticks(
        range(len(results.tasks)), [label(task) for task in results.tasks], rotation=40, ha="right", fontsize=SMALL
    )
    axis.set_yticks(range(len(order)), [label(method) for method in order], fontsize=7)
    figure.colorbar(image, ax=axis, label="KL to the full cache (nats, log scale)", fraction=0.03, pad=0.02)
    return _save(figure, out, "kl_by_task.png", f"KL by method and task, {results.heading(ratio)}; best method first")


def _needles(results: Results, reference: str, out: Path) -> tuple[str, str] | None:
    ratio = results.ratios[len(results.ratios) // 2]
    samples = [
        s for s in results.samples if results.task_of[s].startswith("needle") and results.depth_of[s] is not None
    ]
    if not samples:
        return None
    methods = [method for method in dict.fromkeys((reference, best_single(results, ratio))) if method]
    depth_of: dict[str, Any] = results.depth_of
    depths = sorted({round(depth_of[sample], 2) for sample in samples})
    lengths = sorted({results.length_of[sample] for sample in samples})
    figure = Plot(4.6 * len(methods), 1.2 + 0.5 * len(lengths))
    axes = figure.subplots(1, len(methods), squeeze=False)
    for axis, method in zip(axes.flat, methods, strict=True):
        grid = np.full((len(lengths), len(depths)), np.nan)
        for row, length in enumerate(lengths):
            for column, depth in enumerate(depths):
                scores = [
                    results.values[method, ratio][sample]["score"]
                    for sample in samples
                    if (results.length_of[sample], round(depth_of[sample], 2)) == (length, depth)
                    and sample in results.values.get((method, ratio), {})
                ]
                grid[row, column] = np.mean(scores) if scores else np.nan
        heat_map(axis, grid, spec=".2g", fontsize=7)
        axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axis.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=SMALL)
        axis.set_title(label(method), fontsize=NORMAL)
        axis.set_xlabel("depth of the needle", fontsize=SMALL)
        axis.set_ylabel("tokens", fontsize=SMALL)
    return _save(figure, out, "needles.png", f"Score of the needle tasks by depth and length, {results.heading(ratio)}")


def _save(figure: Figure, out: Path, name: str, title: str) -> tuple[str, str]:
    write_atomically(out / name, lambda path: save_small(figure, path))
    return title, name


def save_small(figure: Figure, path: Path) -> None:
    """Save a PNG of 256 colours. It has a third of the size; plots are committed together with their records."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(path, "PNG", optimize=True)
