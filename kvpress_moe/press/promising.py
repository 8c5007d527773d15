"""Promising: the part of the press that keeps a promise about the KL divergence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.press.feedback import Feedback
from kvpress_moe.press.promised_budget import PairSizes, decide, eviction_costs, find_promise, pair_sizes, report_of
from kvpress_moe.routers import Routers
from kvpress_moe.routers.promise import Promise
from kvpress_moe.routers.sight import Sight

logger = logging.getLogger(__name__)


class Promising:
    """What a press does if ``max_kl`` is set. The press itself declares the settings."""

    precision: Any
    max_kl: float | None
    confidence: float
    max_bytes: int | None
    min_bytes: int | None
    _routers: Routers | None
    _feedback: Feedback

    def _find_promise(self) -> Promise:
        """Raise SettingError unless the routers in use can promise what the settings ask for."""
        assert self._routers is not None
        return find_promise(self._routers, self)

    def _promised_share(self, costs: Tensor, sizes: PairSizes, smallest: int, has_whole: bool) -> float:
        """
        The share of a row's bytes, in a 16-bit cache, that the promise needs. It is noted in the statistics.

        Parameters
        ----------
        costs : Tensor, shape (M, U, S)
            Of the pairs of all heads in the compressed layers.
        sizes : PairSizes
        smallest : int
            Bytes of a head that keeps one pair.
        has_whole : bool
            Whether pairs may stay as the model wrote them.
        """
        promise, sight = self._find_promise(), Sight.of(costs, *sizes)
        _, n_heads, n_tokens = costs.shape
        assert self.max_kl is not None
        wanted, bounds = (self.max_kl, self.confidence), (self.min_bytes, self.max_bytes)
        decision = decide(promise, sight, *wanted, bounds, n_heads, smallest, has_whole)
        self._feedback.stats.add_promise(report_of(promise, sight, *wanted, decision, n_tokens))
        if decision.is_unlike:
            logger.warning(
                "MoERouterPress: a prompt of %d tokens is unlike the prompts that max_kl was calibrated with. It got a "
                "wider margin and keeps %.1f%% of the %s, but nothing is promised. Calibrate with texts of this kind: "
                "kvpress-moe calibrate --texts DIR.",
                n_tokens,
                100 * decision.share,
                "pairs" if self.precision is None else "bytes",
            )
        if not decision.is_enough:
            logger.warning(
                "MoERouterPress: max_bytes=%s, or the menu, is too small for max_kl=%s with a prompt of %d tokens; the "
                "expected KL divergence is %.2g.",
                self.max_bytes,
                self.max_kl,
                n_tokens,
                decision.expected_kl,
            )
        return decision.share

    def _promised_pairs(self, scores: Mapping[int, Tensor], head_dim: int) -> int:
        """Number of pairs that a head of a row keeps on average, from the scores (1, H, S) of all layers."""
        assert self._routers is not None
        device = next(iter(scores.values())).device
        layers = [eviction_costs(self._routers.layers[layer_idx], own) for layer_idx, own in scores.items()]
        costs = torch.cat([layer[:, 0].to(device) for layer in layers], dim=1)
        sizes, k_len = pair_sizes(None, head_dim), costs.shape[-1]
        share = self._promised_share(costs, sizes, sizes.whole, has_whole=True)
        return max(1, min(k_len, int(k_len * share)))


def rows_apart(press: Any, n_rows: int, starts: list[int] | None) -> list[int] | None:
    """Where the text of each row begins, if rows have to be decided one by one; None if not."""
    return [0] * n_rows if starts is None and press.max_kl is not None and n_rows > 1 else starts
