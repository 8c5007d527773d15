"""RoutingStats: what was counted. Sums stay on the device and are read only when asked for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class RoutingStats:
    """
    Exact counts per layer, kept as running sums on the layer's device.

    A layer's sums: ``calls``, ``tokens``, ``aux_loss`` (from routing); ``assigned`` (tokens per expert), ``used``
    (calls in which an expert judged a token); ``judged`` and ``kept`` (KV pairs per expert that went through eviction,
    and that stayed), ``mass`` and ``hit`` (attention mass on them).
    """

    def __init__(self) -> None:
        self._layers: dict[int, dict[str, Any]] = defaultdict(dict)

    def reset(self) -> None:
        """Forget everything that was counted."""
        self._layers.clear()

    def snapshot(self) -> dict[int, dict[str, Any]]:
        """What :meth:`restore` takes; sums are never written in place, so this copies no tensor."""
        return {layer_idx: dict(sums) for layer_idx, sums in self._layers.items()}

    def restore(self, snapshot: dict[int, dict[str, Any]]) -> None:
        """Go back to what was counted when the snapshot was taken."""
        self._layers.clear()
        self._layers.update(snapshot)

    def add(self, layer_idx: int, **counts: int | Tensor) -> None:
        """Add to a layer's sums."""
        sums = self._layers[layer_idx]
        for name, count in counts.items():
            count = count.detach().double() if isinstance(count, Tensor) else count
            sums[name] = sums[name] + count if name in sums else count

    def as_dict(self, num_experts: int) -> dict[str, Any]:
        """
        All counts as plain numbers and lists.

        Returns
        -------
        dict
            ``total_aux_loss``, ``avg_aux_loss`` (sum, and mean over layers and calls, of the unscaled auxiliary loss),
            ``forward_count`` (calls that the most often called layer has seen) and ``layer_stats``, by layer:

            - ``router_stats``: ``expert_usage_ratios`` (shares of all assignments, summing to 1),
              ``expert_usage_count`` (tokens assigned), ``total_tokens``.
            - ``expert_compression_stats``: ``expert_usage`` (calls in which it judged a token), ``compression_ratios``
              (share of its pairs that was evicted), ``cache_hit_rates`` (share of the attention mass on its pairs that
              falls on kept ones). NaN where nothing was counted.
        """
        layers = {layer_idx: self._layer(sums, num_experts) for layer_idx, sums in sorted(self._layers.items())}
        calls = [int(sums["calls"]) for sums in self._layers.values()]
        total = sum(float(sums["aux_loss"]) for sums in self._layers.values())
        return {
            "total_aux_loss": total,
            "avg_aux_loss": total / sum(calls) if calls else 0.0,
            "forward_count": max(calls, default=0),
            "layer_stats": layers,
        }

    @staticmethod
    def _layer(sums: dict[str, Any], num_experts: int) -> dict[str, Any]:
        unknown = torch.full((num_experts,), torch.nan)
        assigned = sums["assigned"]
        return {
            "router_stats": {
                "expert_usage_ratios": (assigned / assigned.sum()).tolist(),
                "expert_usage_count": [int(count) for count in assigned.tolist()],
                "total_tokens": int(sums["tokens"]),
            },
            "expert_compression_stats": {
                "expert_usage": [int(count) for count in sums["used"].tolist()],
                "compression_ratios": (1 - sums["kept"] / sums["judged"] if "judged" in sums else unknown).tolist(),
                "cache_hit_rates": (sums["hit"] / sums["mass"] if "mass" in sums else unknown).tolist(),
            },
        }
