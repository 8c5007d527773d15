"""Plots of a benchmark's metrics over the share of evicted pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvpress_moe.benchmark.results import Estimate, Results, best_of_ours, best_single, load, mean_over_tasks, ranked
from kvpress_moe.errors import SettingError
from kvpress_moe.report.figures.style import COLOURS, MARKERS, NORMAL, OTHERS, REFERENCE, SMALL, Plot, label, spaced

#: The metrics that can be drawn, and their labels.
METRICS = {
    "kl": "KL to the full cache, nats",
    "score": "task score",
    "nll": "NLL of the right answer, nats",
    "extra": "NLL beyond the full cache's, nats",
    "hit": "hit rate",
}
_SHARES = ("score", "hit")
_FULL_IS_A_LINE = ("score", "nll")


def over_ratio(
    records: Results | str | Path | Sequence[str | Path],
    metric: str = "kl",
    methods: Sequence[str] | None = None,
    by_task: bool = False,
) -> Figure:
    """
    A metric of a benchmark over the compression ratio, with 95 % bootstrap intervals.

    Methods that are not named are drawn in grey, without intervals.

    Parameters
    ----------
    records : Results, path or sequence of paths
        Directories that ``kvpress-moe bench`` wrote, or the result of :func:`kvpress_moe.benchmark.results.load`.
    metric : {"kl", "score", "nll", "extra", "hit"}
        ``extra`` is the NLL beyond the full cache's. KL is drawn on a logarithmic scale.
    methods : sequence of str, optional
        At most seven; the first is drawn in front. Default: ours, random, and the best of the other groups.
    by_task : bool
        Draw one panel per task instead of the mean of the tasks' means.

    Raises
    ------
    SettingError
        If the records cannot be read, or the metric or a method is not in them.
    """
    if not isinstance(records, Results):
        records = load([Path(run) for run in ([records] if isinstance(records, (str, Path)) else records)])
    if metric not in METRICS:
        raise SettingError("metric", metric, f"one of {', '.join(METRICS)}", "")
    named = list(shown(records, best_of_ours(records)) if methods is None else methods)
    there = [method for method in records.methods if method != "full"]
    if not 1 <= len(named) <= len(COLOURS):
        raise SettingError("methods", named, f"one to {len(COLOURS)} methods", "The others are drawn in grey.")
    for method in named:
        if method not in there:
            raise SettingError("methods", method, f"methods of the records: {', '.join(there)}", "")
    panels = [[task] for task in records.tasks] if by_task else [records.tasks]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Plot(3.1 * columns, 2.3 * rows + 0.8) if by_task else Plot(5.6, 4.2)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, tasks in zip(axes.flat, panels, strict=False):
        _panel(axis, records, metric, named, tasks)
        if by_task:
            axis.set_title(label(tasks[0]), fontsize=NORMAL)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest panel of each column
        axis.set_xlabel("bytes removed" if records.header.get("by_bytes") else "pairs evicted", fontsize=SMALL)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if by_task else 3, fontsize=SMALL, frameon=False)
    figure.supylabel(METRICS[metric], fontsize=NORMAL)
    return figure


def shown(results: Results, reference: str, most: int = len(COLOURS)) -> list[str]:
    """Methods that a plot names: ours, the best single press of each ratio, the best of the other groups, random."""
    names = [reference]
    names += [best for ratio in results.ratios if (best := best_single(results, ratio))]
    order = ranked(results)
    for group in ("multi-pass", "budget", "ours"):
        names += [method for method in order if results.group(method) == group][:1]
    names += ["random"] if "random" in results.methods else []
    return list(dict.fromkeys(names))[:most]


def _panel(axis: Axes, results: Results, metric: str, named: Sequence[str], tasks: Sequence[str]) -> None:
    ratios = np.array(results.ratios)
    for method in results.methods:
        if method not in named and method != "full":
            line = [_estimate(results, method, ratio, metric, tasks, resample=False).mean for ratio in ratios]
            axis.plot(ratios, line, color=OTHERS, linewidth=0.6, zorder=1)
    full = _estimate(results, "full", 0.0, metric, tasks, resample=False).mean
    if metric in _FULL_IS_A_LINE and np.isfinite(full):
        axis.axhline(full, color=REFERENCE, linestyle="--", linewidth=1, label="full cache", zorder=2)
    for number, method in enumerate(named):
        found = [_estimate(results, method, ratio, metric, tasks) for ratio in ratios]
        means = np.array([estimate.mean for estimate in found])
        low = [estimate.mean - estimate.low for estimate in found]
        high = [estimate.high - estimate.mean for estimate in found]
        axis.errorbar(
            ratios + (number - len(named) / 2) * 0.006,  # side by side, so that intervals can be seen
            means,
            (low, high),
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=3.5,
            linewidth=1.4 if number == 0 else 1,
            elinewidth=0.7,
            label=label(method),
            zorder=4 if number == 0 else 3,
        )
    if metric == "kl":
        axis.set_yscale("log")
    if metric in _SHARES:
        axis.set_ylim(-0.05, 1.05)
    apart = (ratios[-1] - ratios[0]) / 8
    axis.set_xticks(ratios, spaced([f"{ratio:.0%}" for ratio in ratios], ratios.tolist(), apart), fontsize=SMALL)
    axis.tick_params(axis="y", labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)


def _estimate(
    results: Results, method: str, ratio: float, metric: str, tasks: Sequence[str], resample: bool = True
) -> Estimate:
    by_task = results.by_task((method, ratio), metric)
    by_task = {task: by_task[task] for task in tasks if task in by_task}
    if resample or not by_task:
        return mean_over_tasks(by_task)
    mean = float(np.mean([values.mean() for values in by_task.values()]))
    return Estimate(mean, mean, mean)
