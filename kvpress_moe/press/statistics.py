"""RoutingStats: counts of routing and eviction. Sums stay on the device until they are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.codes.precision import Precision

MOST_PROMISES = 1000  # rows of prompts whose promises are kept


class RoutingStats:
    """
    Exact counts per layer, as running sums on the layer's device.

    The sums of a layer: ``calls``, ``tokens``, ``aux_loss`` (from routing); ``assigned`` (tokens per expert); ``used``
    (calls in which an expert judged a token); ``judged`` and ``kept`` (per expert: KV pairs that went through eviction,
    and those of them that stayed); ``mass`` and ``hit`` (per expert: attention mass on these pairs, and on those of
    them that stayed). With a precision, for each strategy X: ``pairs X``, ``bytes X``, ``lost X`` (costs over that of
    eviction) and ``mass X``.
    """

    def __init__(self) -> None:
        self._layers: dict[int, dict[str, Any]] = defaultdict(dict)
        self._promises: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget all counts."""
        self._layers.clear()
        self._promises = []

    def snapshot(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        """The counts, for :meth:`restore`. Sums are never changed in place, so no tensor is copied."""
        return {layer_idx: dict(sums) for layer_idx, sums in self._layers.items()}, self._promises

    def restore(self, snapshot: tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]) -> None:
        """Go back to the counts of a snapshot."""
        layers, self._promises = snapshot
        self._layers.clear()
        self._layers.update(layers)

    def add_promise(self, report: dict[str, Any]) -> None:
        """Note what was chosen for a row of a prompt to keep a promise, as plain data."""
        self._promises = [*self._promises[1 - MOST_PROMISES :], report]

    def add(self, layer_idx: int, **counts: int | Tensor) -> None:
        """Add to a layer's sums."""
        sums = self._layers[layer_idx]
        for name, count in counts.items():
            count = count.detach().double() if isinstance(count, Tensor) else count
            sums[name] = sums[name] + count if name in sums else count

    def add_strategies(
        self,
        layer_idx: int,
        menu: Sequence[Precision],
        nbytes: Tensor,
        strategies: Tensor,
        costs: Tensor,
        mass: Tensor,
    ) -> None:
        """
        Count the pairs of each strategy, their bytes, the attention that they get, and what they lost.

        Parameters
        ----------
        layer_idx : int
        menu : sequence of Precision
        nbytes : Tensor, shape (M,)
            Bytes of a pair with each strategy. The first strategy evicts.
        strategies : Tensor, shape (B, H, S)
        costs : Tensor, shape (M, B, H, S)
            See :func:`kvpress_moe.press.packing.cost_of_strategies`.
        mass : Tensor, shape (B, H, S)
            Attention of the latest queries to each pair.
        """
        names = ["evict", *map(str, menu)]
        for number, name in enumerate(names):
            chosen = strategies == number
            weights = costs[0][chosen].double().clamp(min=torch.finfo(torch.float32).tiny)
            lost = costs[number][chosen].double() / weights
            self.add(
                layer_idx,
                **{f"pairs {name}": chosen.sum(), f"bytes {name}": chosen.sum() * int(nbytes[number])},
                **{f"lost {name}": lost.sum(), f"mass {name}": mass[chosen].sum()},
            )

    def as_dict(self, num_experts: int) -> dict[str, Any]:
        """
        All counts as plain numbers and lists.

        Returns
        -------
        dict
            ``total_aux_loss`` and ``avg_aux_loss`` (sum, and mean over layers and calls, of the unscaled auxiliary
            loss), ``forward_count`` (calls of the layer that was called most often) and ``layer_stats``, by layer:

            - ``router_stats``: ``expert_usage_ratios`` (shares of all assignments, summing to 1),
              ``expert_usage_count`` (tokens assigned to each expert), ``total_tokens``.
            - ``expert_compression_stats``, each per expert: ``expert_usage`` (calls in which the expert judged a
              token), ``compression_ratios`` (share of the expert's pairs that was evicted), ``cache_hit_rates`` (share
              of the attention mass on the expert's pairs that falls on kept pairs). NaN where nothing was counted.
            - ``strategy_stats``, only with ``precision``: by strategy (``"evict"``, ``"K8V4"``, …) a dict of ``pairs``,
              ``bytes`` (codes with their scales and positions), ``usage_ratio`` and ``attention_ratio`` (these pairs'
              shares of all pairs, and of the attention of the latest queries without the first four tokens; each sums
              to 1) and ``mean_distortion`` (mean expected cost of these pairs; 1 is the cost of evicting them).

            With ``max_kl`` also ``promises``: for each row of each prompt a dict of ``max_kl``, ``confidence``,
            ``share`` (of the bytes of a 16-bit cache, or of the pairs, that stayed), ``expected_kl`` (the estimate, a
            median, in nats), ``is_unlike`` (whether the prompt is unlike those of the calibration; then nothing is
            promised), ``is_enough`` (False if ``max_bytes`` forbids the share that is needed), ``n_tokens``, and the
            curve: ``expected_kls`` at ``shares``. Of the latest 1,000 rows.
        """
        layers = {layer_idx: self._layer(sums, num_experts) for layer_idx, sums in sorted(self._layers.items())}
        calls = [int(sums.get("calls", 0)) for sums in self._layers.values()]
        total = sum(float(sums.get("aux_loss", 0)) for sums in self._layers.values())
        return {
            "total_aux_loss": total,
            "avg_aux_loss": total / sum(calls) if any(calls) else 0.0,
            "forward_count": max(calls, default=0),
            "layer_stats": layers,
            **({"promises": [dict(report) for report in self._promises]} if self._promises else {}),
        }

    @staticmethod
    def _layer(sums: dict[str, Any], num_experts: int) -> dict[str, Any]:
        unknown = torch.full((num_experts,), torch.nan)
        none = torch.zeros(num_experts)  # after reset_stats while tokens are generated, no prompt has been counted
        assigned = sums.get("assigned", none)
        names = [name.removeprefix("pairs ") for name in sums if name.startswith("pairs ")]
        all_pairs, all_mass = (sum(sums[f"{what} {name}"] for name in names) for what in ("pairs", "mass"))
        strategies = {
            name: {
                "pairs": int(sums[f"pairs {name}"]),
                "bytes": int(sums[f"bytes {name}"]),
                "usage_ratio": float(sums[f"pairs {name}"] / all_pairs),
                "attention_ratio": float(sums[f"mass {name}"] / all_mass),
                "mean_distortion": float(sums[f"lost {name}"] / sums[f"pairs {name}"]),  # 0 / 0 is NaN
            }
            for name in names
        }
        packed = {"strategy_stats": strategies} if strategies else {}
        return packed | {
            "router_stats": {
                "expert_usage_ratios": (assigned / assigned.sum()).tolist(),
                "expert_usage_count": [int(count) for count in assigned.tolist()],
                "total_tokens": int(sums.get("tokens", 0)),
            },
            "expert_compression_stats": {
                "expert_usage": [int(count) for count in sums.get("used", none).tolist()],
                "compression_ratios": (1 - sums["kept"] / sums["judged"] if "judged" in sums else unknown).tolist(),
                "cache_hit_rates": (sums["hit"] / sums["mass"] if "mass" in sums else unknown).tolist(),
            },
        }
