"""Plot of a benchmark's KL over the bytes of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from kvpress_moe.benchmark.results import Results, best_of_ours, load, mean_over_tasks, ranked
from kvpress_moe.errors import SettingError
from kvpress_moe.report.figures.style import COLOURS, MARKERS, NORMAL, REFERENCE, SMALL, Plot, label, spaced


def over_bytes(records: Results | str | Path | Sequence[str | Path], methods: Sequence[str] | None = None) -> Figure:
    """
    KL of a benchmark over the share of a 16-bit cache's bytes, with 95 % bootstrap intervals. Both scales are
    logarithmic.

    Parameters
    ----------
    records : Results, path or sequence of paths
        Directories that ``kvpress-moe bench --bytes`` wrote, or their results.
    methods : sequence of str, optional
        At most seven lines; the first is drawn in front. Default: ours, then the others by their KL. Methods that take
        a share of their own are drawn as single points.

    Raises
    ------
    SettingError
        If the records cannot be read, or a method is not in them.
    """
    if not isinstance(records, Results):
        records = load([Path(run) for run in ([records] if isinstance(records, (str, Path)) else records)])
    order = [best_of_ours(records), *ranked(records)]
    named = list(dict.fromkeys(order if methods is None else methods))[: len(COLOURS)]
    for method in named:
        if method not in records.methods or records.is_fixed(method):
            raise SettingError("methods", method, f"some of {', '.join(ranked(records))}", "")
    figure = Plot(6.2, 4.6)
    axis = figure.add_subplot()
    for number, method in enumerate(named):
        cells = [(method, ratio) for ratio in records.ratios]
        shares = [mean_over_tasks(records.by_task(cell, "byte_share")).mean for cell in cells]
        found = [mean_over_tasks(records.by_task(cell, "kl")) for cell in cells]
        means = np.array([estimate.mean for estimate in found])
        low = means - np.array([estimate.low for estimate in found])
        high = np.array([estimate.high for estimate in found]) - means
        axis.errorbar(
            shares,
            means,
            (low, high),
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=4,
            linewidth=1.8 if number == 0 else 1,
            elinewidth=0.7,
            label=label(method),
            zorder=4 if number == 0 else 3,
        )
    for method, ratio in records.fixed.items():
        share = mean_over_tasks(records.by_task((method, ratio), "byte_share")).mean
        kl = mean_over_tasks(records.by_task((method, ratio), "kl")).mean
        axis.plot(share, kl, marker="x", color=REFERENCE, linestyle="none", zorder=5)
        axis.annotate(label(method), (share, kl), xytext=(4, 3), textcoords="offset points", fontsize=SMALL)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = sorted(1 - ratio for ratio in records.ratios)
    axis.set_xticks(
        ticks, spaced([f"{tick:.4g}" for tick in ticks], [float(np.log(tick)) for tick in ticks], 0.15), fontsize=SMALL
    )
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", labelsize=SMALL)
    axis.set_xlabel("share of a 16-bit cache's bytes", fontsize=NORMAL)
    axis.set_ylabel("KL to the full cache, nats", fontsize=NORMAL)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=SMALL, frameon=False)
    return figure
