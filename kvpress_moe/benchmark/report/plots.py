"""Plots of the report, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvpress_moe.benchmark.report.markdown import ranked
from kvpress_moe.benchmark.report.summary import Results, best_single, mean_over_tasks

# Okabe and Ito's palette, safe for colour-blind readers
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def shown(results: Results, reference: str, most: int = 32) -> list[str]:
    """Methods that a plot names: ours, random, the best single presses of each ratio, the best of the other groups."""
    names = [reference]
    names += [best for ratio in results.ratios if (best := best_single(results, ratio))]
    order = ranked(results)
    for group in ("multi-pass", "budget", "ours"):
        names += [method for method in order if results.group(method) == group][:1]
    names += ["random"] if "random" in results.methods else []
    return list(dict.fromkeys(names))[:most]


def draw(results: Results, reference: str, out: Path) -> list[tuple[str, str]]:
    """All plots, as (title, file name)."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_over_ratios(results, reference, out), _heat_map(results, out)]
    needles = _needles(results, reference, out)
    return drawn + ([needles] if needles else [])


def _label(name: str, most: int = 32) -> str:
    """A name that fits into a plot, its dollar signs no formula."""
    name = " ".join(name.split())
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", "\\$")


def _over_ratios(results: Results, reference: str, out: Path) -> tuple[str, str]:
    from matplotlib import pyplot

    columns = min(4, len(results.tasks))
    rows = -(-len(results.tasks) // columns)
    size = (3.1 * columns, 2.3 * rows + 0.8)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    named = shown(results, reference)
    for axis, task in zip(axes.flat, results.tasks, strict=False):
        for method in results.methods:
            if method in named or method == "full":
                continue
            means = [
                results.by_task((method, ratio), "score").get(task, np.array([np.nan])).mean()
                for ratio in results.ratios
            ]
            axis.plot(results.ratios, means, color="#cccccc", linewidth=0.6, zorder=1)
        full = results.by_task(("full", 0.0), "score").get(task)
        if full is not None:
            axis.axhline(full.mean(), color="#555555", linestyle="--", linewidth=1, label="full cache", zorder=2)
        for number, method in enumerate(named):
            estimates = [
                mean_over_tasks(
                    {task: values}
                    if (values := results.by_task((method, ratio), "score").get(task)) is not None
                    else {}
                )
                for ratio in results.ratios
            ]
            shifted = np.array(results.ratios) + (number - len(named) / 2) * 0.006
            low = [estimate.mean - estimate.low for estimate in estimates]
            high = [estimate.high - estimate.mean for estimate in estimates]
            axis.errorbar(
                shifted,
                [estimate.mean for estimate in estimates],
                (low, high),
                color=_COLOURS[number],
                marker="o",
                markersize=3,
                linewidth=1.4 if method == reference else 1,
                elinewidth=0.7,
                label=_label(method),
                zorder=4 if method == reference else 3,
            )
        axis.set_title(_label(task), fontsize=9)
        axis.set_ylim(-0.05, 1.05)
        axis.set_xticks(results.ratios, [f"{ratio:.0%}" for ratio in results.ratios], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(results.tasks) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.supylabel("score", fontsize=9)
    return _save(figure, out, "score.png", "Task score over the share of pairs evicted; grey: all other methods")


def _heat_map(results: Results, out: Path) -> tuple[str, str]:
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    ratio = results.ratios[len(results.ratios) // 2]
    order = ranked(results)
    grid = np.full((len(order), len(results.tasks)), np.nan)
    for row, method in enumerate(order):
        for column, task in enumerate(results.tasks):
            values = results.by_task((method, ratio), "kl").get(task)
            grid[row, column] = np.nan if values is None else values.mean()
    figure, axis = pyplot.subplots(figsize=(1.6 + 0.62 * len(results.tasks) + 1.2, 1.4 + 0.24 * len(order)))
    image = axis.imshow(np.clip(grid, 1e-3, None), norm=LogNorm(1e-3, 3), cmap="cividis_r", aspect="auto")
    for row in range(len(order)):
        for column in range(len(results.tasks)):
            value = grid[row, column]
            if np.isfinite(value):
                colour = "white" if value > 0.25 else "black"
                axis.text(
                    column,
                    row,
                    f"{value:.2g}" if value < 9.95 else ">9",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=colour,
                )
    axis.set_xticks(
        range(len(results.tasks)), [_label(task) for task in results.tasks], rotation=40, ha="right", fontsize=8
    )
    axis.set_yticks(range(len(order)), [_label(method) for method in order], fontsize=7)
    figure.colorbar(image, ax=axis, label="KL to the full cache (nats, log scale)", fraction=0.03, pad=0.02)
    figure.tight_layout()
    return _save(figure, out, "kl_by_task.png", f"KL by method and task, {ratio:.0%} evicted; best method first")


def _needles(results: Results, reference: str, out: Path) -> tuple[str, str] | None:
    from matplotlib import pyplot

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
    figure, axes = pyplot.subplots(
        1, len(methods), figsize=(4.6 * len(methods), 1.2 + 0.5 * len(lengths)), squeeze=False
    )
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
        axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(
                    column,
                    row,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if value > 0.5 else "white",
                )
        axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axis.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axis.set_title(_label(method), fontsize=9)
        axis.set_xlabel("depth of the needle", fontsize=8)
        axis.set_ylabel("tokens", fontsize=8)
    figure.tight_layout()
    return _save(figure, out, "needles.png", f"Score of the needle tasks by depth and length, {ratio:.0%} evicted")


def _save(figure: Any, out: Path, name: str, title: str) -> tuple[str, str]:
    from matplotlib import pyplot

    from kvpress_moe.checkpoint import write_atomically

    write_atomically(out / name, lambda path: figure.savefig(path, dpi=110, format="png"))
    pyplot.close(figure)
    return title, name
