"""Heat maps of layer × expert, from a press's statistics: usage of the experts and hit rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvpress_moe.errors import SettingError
from kvpress_moe.report.figures.style import layer_map


def expert_usage(stats: Mapping[str, Any], names: Sequence[str] | Mapping[int, str] | None = None) -> Figure:
    """
    Each expert's share of all assignments, by layer.

    If every expert judges every token (``top_k`` is the number of experts, as in the shipped routers), all shares are
    equal by definition.

    Parameters
    ----------
    stats : dict
        ``press.get_stats()``.
    names : sequence or mapping of str, optional
        Names of the experts: ``press.expert_strategies`` or a list. Default: their numbers.

    Raises
    ------
    SettingError
        If nothing was counted yet, or there is not one name for each expert.
    """
    layers, grid = _by_expert(stats, "router_stats", "expert_usage_ratios")
    return layer_map(grid, layers, _labels(names, grid.shape[1]), "expert", "share of assignments", spec=".2f")


def hit_rates(stats: Mapping[str, Any], names: Sequence[str] | Mapping[int, str] | None = None) -> Figure:
    """
    Share of the attention mass on each expert's pairs that falls on kept pairs, by layer; grey if unknown.

    Parameters and errors as of :func:`kvpress_moe.plots.expert_usage`.
    """
    layers, grid = _by_expert(stats, "expert_compression_stats", "cache_hit_rates")
    return layer_map(grid, layers, _labels(names, grid.shape[1]), "expert", "hit rate", spec=".2f")


def _by_expert(stats: Mapping[str, Any], part: str, name: str) -> tuple[list[int], np.ndarray]:
    try:
        by_layer = {layer: stats["layer_stats"][layer][part][name] for layer in stats["layer_stats"]}
    except (KeyError, TypeError, IndexError) as error:
        raise SettingError(
            "stats", type(stats).__name__, "what press.get_stats() returns", f"It lacks {error}."
        ) from error
    if not by_layer:
        raise SettingError("stats", {}, "counts of at least one layer", "Prefill a prompt inside `with press(model):`.")
    return list(by_layer), np.array(list(by_layer.values()), dtype=float)


def _labels(names: Sequence[str] | Mapping[int, str] | None, num_experts: int) -> list[str]:
    if names is None:
        return [str(index) for index in range(num_experts)]
    labels = list(names.values()) if isinstance(names, Mapping) else list(names)
    if isinstance(names, str) or len(labels) != num_experts:
        raise SettingError(
            "names", names if isinstance(names, str) else labels, f"one name for each of the {num_experts} experts",
            "Pass press.expert_strategies.",
        )  # fmt: skip
    return labels
