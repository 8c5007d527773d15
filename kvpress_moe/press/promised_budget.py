"""Promised budgets: how much a row of a prompt keeps, so that its KL divergence stays below the user's bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress_moe.budget.shared_bytes import as_costs
from kvpress_moe.cache.tier import TABLE_BYTES
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.precision import Precision
from kvpress_moe.errors import SettingError
from kvpress_moe.press.packing import Menu
from kvpress_moe.routers import Routers
from kvpress_moe.routers.base import BaseMoERouter
from kvpress_moe.routers.promise import Decision, Promise
from kvpress_moe.routers.sight import Sight

ELEMENT_SIZE = 2  # shares are those of a 16-bit cache, whatever type the model has
JUST_BELOW_1 = 0.9999  # a share of 1 means that nothing changes


class PairSizes(NamedTuple):
    """Bytes of a pair in a 16-bit cache: with each strategy (M,), and as the model wrote it."""

    nbytes: Tensor
    whole: int


def pair_sizes(menu: Menu | None, head_dim: int, basis: KeyBasis | None = None) -> PairSizes:
    """
    Bytes of a pair with the strategies of a menu. ``None``: a pair is evicted or stays as it is.

    Raises
    ------
    SettingError
        If the precisions have another order in a 16-bit cache than in this one.
    """
    whole = 2 * head_dim * ELEMENT_SIZE
    if menu is None:
        return PairSizes(torch.tensor([0, whole]), whole)
    nbytes = [0, *(precision.nbytes(head_dim, ELEMENT_SIZE, basis) for precision in menu.precisions)]
    if nbytes != sorted(nbytes):
        raise SettingError(
            "precision",
            setting_of(menu.precisions),
            "precisions that have the same order by bytes in a 16-bit cache, with max_kl",
            "Leave out those that are whole in one part only.",
        )
    return PairSizes(torch.tensor(nbytes), whole)


def setting_of(menu: Sequence[Precision]) -> str:
    """A name for the precisions that a press may choose from: ``"K8V4,K4V2"``; ``"none"`` without a precision."""
    return ",".join(map(str, menu)) or "none"


def eviction_costs(router: BaseMoERouter, scores: Tensor) -> Tensor:
    """What it costs to evict each pair, and to keep it: (2, B, H, S), bfloat16, from scores (B, H, S)."""
    costs = as_costs(router.score_power * scores.float())
    return torch.stack((costs, torch.zeros_like(costs)))


def find_promise(routers: Routers, press: Any) -> Promise:
    """
    The promise of the routers for the settings of a press.

    Raises
    ------
    SettingError
        If the routers were not calibrated for these settings, or not for this bound and confidence.
    """
    name = setting_of(press.menu)
    if not routers.promises:
        raise SettingError(
            "max_kl", press.max_kl, "None with routers that were never calibrated", "Run kvpress-moe calibrate."
        )
    if name not in routers.promises:
        raise SettingError(
            "precision",
            press.precision,
            f"one that the routers were calibrated for ({'; '.join(sorted(routers.promises))}), with max_kl",
            "Run kvpress-moe calibrate --precision …",
        )
    promise = routers.promises[name]
    for field in ("min_share", "top_k", "capacity_factor"):
        if getattr(press, field) != promise.about[field]:
            raise SettingError(
                field,
                getattr(press, field),
                f"{promise.about[field]} with max_kl, as in the calibration",
                "Leave it out, or calibrate with it.",
            )
    promise.check(press.max_kl, press.confidence)
    return promise


def decide(
    promise: Promise, press: Any, sight: Sight, n_heads: int, n_tokens: int, pair_bytes: int, n_tables: int
) -> Decision:
    """
    What a row keeps.

    Parameters
    ----------
    promise : Promise
    press : MoERouterPress
    sight : Sight
    n_heads : int
        Number of heads of all layers.
    n_tokens : int
    pair_bytes : int
        Bytes of a pair as the model wrote it, in the cache in use.
    n_tables : int
        Number of tables of each head. ``max_bytes`` counts them.

    Raises
    ------
    SettingError
        If ``max_bytes`` is less than what one pair of each head takes.
    """
    full = n_heads * n_tokens * pair_bytes
    counted = sight.full_bytes if n_tables else full  # codes have the same size in every cache, whole pairs do not
    least = 0.0 if press.min_bytes is None else min(1.0, press.min_bytes / counted)
    most = 1.0
    if press.max_bytes is not None and press.max_bytes < full:
        smallest = n_heads * (pair_bytes + n_tables * TABLE_BYTES)
        if press.max_bytes < smallest:
            raise SettingError(
                "max_bytes",
                press.max_bytes,
                f"at least {smallest} bytes, one pair of each head",
                "Raise it, or leave it out.",
            )
        most = min(JUST_BELOW_1, press.max_bytes / counted)
    return promise.decide(sight, press.max_kl, press.confidence, least, most)


def report_of(promise: Promise, press: Any, sight: Sight, decision: Decision, n_tokens: int) -> dict[str, Any]:
    """What was chosen and expected, as plain data for the statistics."""
    return {
        "max_kl": press.max_kl,
        "confidence": press.confidence,
        **decision._asdict(),
        "n_tokens": n_tokens,
        "shares": promise.shares.tolist(),
        "expected_kls": promise.curve(sight).tolist(),
    }
