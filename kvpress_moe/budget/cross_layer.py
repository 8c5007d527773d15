"""SharedBudget: collects the scores of layers that share one budget, until the budget can be decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.budget.allocation import share


@dataclass
class Observation:
    """
    What is needed of a layer to count the cost of its eviction, once the eviction is decided.

    Attributes
    ----------
    routed : Tensor, shape (B, 1 or H, S, E), bool
        Which expert judged which pair.
    mass : Tensor, shape (B, H, S), float32
        Attention of the latest queries to each pair.
    """

    routed: Tensor
    mass: Tensor


class SharedBudget:
    """
    Collects the scores (B, H, S) of a prompt's layers, then decides for all of them at once.

    The scores of a layer come as a list: one tensor for the whole batch, or one tensor for each row of a padded batch.
    Rows never compete with each other.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[Tensor, Observation]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_waiting": {}}

    def clear(self) -> None:
        """Forget the layers of a prompt whose forward pass did not end."""
        self._waiting.clear()

    def add(self, layer_idx: int, parts: list[tuple[Tensor, Observation]]) -> None:
        """Let a layer wait. Each part of the batch has its scores, and what was observed."""
        self._waiting[layer_idx] = parts

    def decide(
        self, n_kept: Callable[[int, Mapping[int, Tensor]], int], floor: Callable[[int], int]
    ) -> dict[int, list[tuple[Tensor, Observation]]]:
        """
        The pairs (B, H, S) that stay in each waiting layer, part by part.

        ``n_kept(part, scores)`` tells how many pairs a head of a part keeps on average. The total is exact. ``scores``
        are those (B, H, S) of the waiting layers, by layer. ``floor(n)`` tells how many each head keeps at least, if
        heads keep n pairs on average.

        Memory: two float32 copies and one int64 copy of all scores (H · S numbers per layer), on the device of the
        first layer.
        """
        decided: dict[int, list[tuple[Tensor, Observation]]] = {layer_idx: [] for layer_idx in self._waiting}
        for number, layers in enumerate(zip(*self._waiting.values(), strict=True)):
            n_kept_of_part = n_kept(number, {index: parts[number][0] for index, parts in self._waiting.items()})
            device = layers[0][0].device
            pooled = torch.cat([scores.float().to(device) for scores, _ in layers], dim=1)  # (B, L·H, S)
            kept = share(pooled, n_kept_of_part, floor(n_kept_of_part))
            by_layer = kept.split([scores.shape[1] for scores, _ in layers], dim=1)
            for parts, mask, (scores, observation) in zip(decided.values(), by_layer, layers, strict=True):
                parts.append((mask.to(scores.device), observation))
        self.clear()
        return decided
