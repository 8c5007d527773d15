"""Figures of kept pairs: by position in the text, and by head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from kvpress_moe.errors import SettingError
from kvpress_moe.report.figures.style import NORMAL, SMALL, Plot, heat_map, layer_axis, layer_map, share_bar


def kept_positions(kept: Mapping[int, Tensor], bins: int = 128) -> Figure:
    """
    Share of pairs that stayed, by layer and by position in the text.

    Parameters
    ----------
    kept : mapping of int -> Tensor (B, H, S), bool
        By layer, as :func:`kvpress_moe.cache.kept_pairs` returns it. Shares are means over batch and heads.
    bins : int
        Number of stretches that the text is cut into. They are as equal as possible; at most one per token.

    Raises
    ------
    SettingError
        If ``kept`` is no such mapping, or ``bins`` is less than 1.
    """
    by_layer = _checked(kept)
    if bins < 1:
        raise SettingError("bins", bins, "at least 1", "")
    n_tokens = next(iter(by_layer.values())).shape[-1]
    edges = np.linspace(0, n_tokens, min(bins, n_tokens) + 1).round().astype(int)
    by_token = np.stack([mask.mean((0, 1)) for mask in by_layer.values()])  # (L, S)
    grid = np.add.reduceat(by_token, edges[:-1], axis=1) / np.diff(edges)
    figure = Plot(7.2, 1.4 + 0.11 * len(by_layer))
    axis = figure.add_subplot()
    image = heat_map(axis, grid)
    image.set_extent((0, n_tokens, len(by_layer) - 0.5, -0.5))
    layer_axis(axis, list(by_layer))
    axis.set_xlabel("position in the text, tokens", fontsize=NORMAL)
    axis.tick_params(axis="x", labelsize=SMALL)
    share_bar(figure, image, axis, "pairs kept")
    return figure


def kept_share(kept: Mapping[int, Tensor]) -> Figure:
    """
    Share of its pairs that each head of each layer kept.

    Parameters
    ----------
    kept : mapping of int -> Tensor (B, H, S), bool
        By layer, as :func:`kvpress_moe.cache.kept_pairs` returns it.

    Raises
    ------
    SettingError
        If ``kept`` is no such mapping.
    """
    by_layer = _checked(kept)
    grid = np.stack([mask.mean((0, 2)) for mask in by_layer.values()])  # (L, H)
    heads = [str(head) for head in range(grid.shape[1])]
    return layer_map(grid, list(by_layer), heads, "KV head", "pairs kept", spec=".2f")


def _checked(kept: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
    remedy = "Pass kvpress_moe.cache.kept_pairs(full, compressed)."
    if not isinstance(kept, Mapping) or not kept:
        raise SettingError("kept", type(kept).__name__, "a mapping of at least one layer to the pairs it kept", remedy)
    for layer, mask in kept.items():
        if not isinstance(mask, Tensor) or mask.ndim != 3 or not mask.numel():
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SettingError("kept", got, f"a tensor (batch, KV heads, tokens) for layer {layer}", remedy)
    shapes = {tuple(mask.shape) for mask in kept.values()}
    if len(shapes) > 1:
        raise SettingError("kept", sorted(shapes), "layers of the same shape", remedy)
    return {layer: mask.cpu().numpy().astype(float) for layer, mask in kept.items()}
