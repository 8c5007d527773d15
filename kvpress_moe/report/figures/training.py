"""Plots of the loss that training logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kvpress_moe.errors import SettingError
from kvpress_moe.files import read_json
from kvpress_moe.report.figures.style import COLOURS, NORMAL, SMALL, line_axis

LOSS = "weighted squared error"


def training_curves(log: Mapping[str, Any] | str | Path) -> Figure:
    """
    The loss of every epoch: one line per layer (from dark, the first, to bright, the last), and their mean.

    Parameters
    ----------
    log : dict or path
        The metrics that :func:`kvpress_moe.training.trainer.train` returns, or the directory of saved routers.

    Raises
    ------
    SettingError
        If there is no such log, or it has no loss by epoch. Logs of older versions have none.
    """
    curves = np.array(_read(log, "loss_by_epoch"), dtype=float)  # (L, epochs)
    figure, axis = line_axis("epoch", LOSS)
    epochs = np.arange(1, curves.shape[1] + 1)
    shades = ScalarMappable(Normalize(0, max(1, len(curves) - 1)), colormaps["cividis"])
    for curve, shade in zip(curves, shades.to_rgba(np.arange(len(curves))), strict=True):
        axis.plot(epochs, curve, color=shade, linewidth=0.8, zorder=2)
    axis.plot(epochs, curves.mean(0), color=COLOURS[0], linewidth=2, marker="o", markersize=4, label="mean", zorder=3)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=SMALL)
    bar = figure.colorbar(shades, ax=axis, fraction=0.05, pad=0.03)
    bar.set_label("fitted layer", fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def loss_by_layer(log: Mapping[str, Any] | str | Path) -> Figure:
    """
    The loss of the last epoch, by fitted layer.

    Parameters and errors as of :func:`kvpress_moe.plots.training_curves`; every log has this loss.
    """
    losses = np.array(_read(log, "loss_by_layer"), dtype=float)
    figure, axis = line_axis("fitted layer", f"{LOSS}, last epoch")
    axis.bar(range(len(losses)), losses, color=COLOURS[1])
    axis.axhline(losses.mean(), color=COLOURS[0], linewidth=1.5, linestyle="--", label="mean")
    axis.legend(frameon=False, fontsize=SMALL)
    return figure


def _read(log: Mapping[str, Any] | str | Path, name: str) -> list[Any]:
    if isinstance(log, Mapping):
        metrics: Any = log
    else:
        path = Path(log) / "routers.json"
        try:
            metrics = read_json(path).get("metrics", {})
        except (OSError, ValueError, AttributeError) as error:
            raise SettingError("log", str(log), "metrics, or a directory of saved routers", str(error)) from error
    if not metrics.get(name):
        remedy = "loss_by_layer draws what older logs hold." if name == "loss_by_epoch" else "Train with this package."
        raise SettingError("log", sorted(metrics), f"metrics with {name}", remedy)
    values: list[Any] = metrics[name]
    return values
