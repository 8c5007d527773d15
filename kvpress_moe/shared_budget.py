"""SharedBudget: scores of layers that wait for each other, because all of them share one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.budget import share


@dataclass
class Observation:
    """
    What is needed of a layer to count what its eviction cost, once that is decided.

    Attributes
    ----------
    routed : Tensor, shape (B, 1 or H, S, E), bool
        Which expert judged which pair.
    mass : Tensor, shape (B, H, S), float32
        Attention of the latest queries.
    """

    routed: Tensor
    mass: Tensor


class SharedBudget:
    """Collects the scores (B, H, S) of a prompt's layers, then decides for all of them at once."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Tensor, Observation]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_waiting": {}}

    def clear(self) -> None:
        """Forget layers of a prompt that was never read to its end."""
        self._waiting.clear()

    def add(self, layer_idx: int, scores: Tensor, observation: Observation) -> None:
        """Let a layer wait."""
        self._waiting[layer_idx] = (scores, observation)

    def decide(self, n_kept: int, min_share: float) -> dict[int, tuple[Tensor, Observation]]:
        """
        The pairs (B, H, S) that stay in each waiting layer; ``n_kept`` per head on average, exact in total.

        Memory: one float32 copy of all scores, H · S per layer, on the device of the first layer.
        """
        layers = {layer_idx: scores.shape[1] for layer_idx, (scores, _) in self._waiting.items()}
        device = next(iter(self._waiting.values()))[0].device
        pooled = torch.cat([scores.float().to(device) for scores, _ in self._waiting.values()], dim=1)  # (B, L·H, S)
        kept = share(pooled, n_kept, min_share).split(list(layers.values()), dim=1)
        decided = {
            layer_idx: (mask.to(scores.device), observation)
            for (layer_idx, (scores, observation)), mask in zip(self._waiting.items(), kept, strict=True)
        }
        self.clear()
        return decided
