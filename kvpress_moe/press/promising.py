"""Promising: the part of the press that keeps a promise about the KL divergence."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kvpress_moe.press.feedback import Feedback
from kvpress_moe.press.promised_budget import PairSizes, decide, eviction_costs, find_promise, pair_sizes, report_of
from kvpress_moe.routers import Routers
from kvpress_moe.routers.promise import Promise
from kvpress_moe.routers.sight import Sight

logger = logging.getLogger(__name__)


class Promising:
    """What a press does if ``max_kl`` is set. The press itself declares the settings."""

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

    def _promised_share(self, costs: Sequence[Tensor], sizes: PairSizes, pair_bytes: int, n_tables: int) -> float:
        """
        The share of a row's bytes, in the cache in use, that the promise needs. It is noted in the statistics.

        Parameters
        ----------
        costs : sequence of Tensor, each (M, 1, H, S)
            For each compressed layer.
        sizes : PairSizes
        pair_bytes : int
            Bytes of a pair as the model wrote it, in the cache in use.
        n_tables : int
            Number of tables of each head; 0 without a precision.
        """
        promise, sight = self._find_promise(), Sight.of(costs, *sizes)
        n_heads, n_tokens = sum(layer.shape[2] for layer in costs), costs[0].shape[-1]
        decision = decide(promise, self, sight, n_heads, n_tokens, pair_bytes, n_tables)
        keep = decision.share * sizes.whole / pair_bytes if n_tables and decision.share < 1 else decision.share
        report = report_of(promise, self, sight, decision, n_tokens)
        self._feedback.stats.add_promise({**report, "compression_ratio": 1 - keep})
        if decision.is_unlike:
            logger.warning(
                "MoERouterPress: a prompt of %d tokens is unlike the prompts that max_kl was calibrated with. It keeps "
                "more, %.1f%% of the bytes, but nothing is promised. Calibrate with texts of this kind: kvpress-moe "
                "calibrate --texts DIR.",
                n_tokens,
                100 * decision.share,
            )
        if not decision.is_kept:
            logger.warning(
                "MoERouterPress: max_bytes=%s is too small for max_kl=%s with a prompt of %d tokens; the expected KL "
                "divergence is %.2g.",
                self.max_bytes,
                self.max_kl,
                n_tokens,
                decision.expected_kl,
            )
        return keep

    def _promised_pairs(self, scores: Mapping[int, Tensor], head_dim: int, element_size: int) -> int:
        """Number of pairs that a head of a row keeps on average, from the scores (1, H, S) of all layers."""
        assert self._routers is not None
        costs = [eviction_costs(self._routers.layers[layer_idx], own) for layer_idx, own in scores.items()]
        keep = self._promised_share(costs, pair_sizes(None, head_dim), 2 * head_dim * element_size, n_tables=0)
        return max(1, int(costs[0].shape[-1] * keep))


def rows_apart(press: Any, n_rows: int, starts: list[int] | None) -> list[int] | None:
    """Where the text of each row begins, if rows have to be decided one by one; None if not."""
    return [0] * n_rows if starts is None and press.max_kl is not None and n_rows > 1 else starts
