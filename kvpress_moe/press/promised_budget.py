"""Promised budgets: how much a row of a prompt keeps, so that its KL divergence stays below the user's bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress_moe.budget.allocation import MIN_PAIRS
from kvpress_moe.budget.shared_bytes import as_costs
from kvpress_moe.codes.precision import Precision
from kvpress_moe.errors import SettingError
from kvpress_moe.press.packing import Menu
from kvpress_moe.routers import Routers
from kvpress_moe.routers.base import BaseMoERouter
from kvpress_moe.routers.promise import Decision, Promise
from kvpress_moe.routers.sight import Sight

ELEMENT_SIZE = 2  # shares are those of a 16-bit cache, whatever type the model has


class PairSizes(NamedTuple):
    """Bytes of a pair in a 16-bit cache: with each strategy (M,), and as the model wrote it."""

    nbytes: Tensor
    whole: int


def pair_sizes(menu: Menu | None, head_dim: int) -> PairSizes:
    """Bytes of a pair with the strategies of a menu of a 16-bit cache. ``None``: a pair is evicted or stays whole."""
    if menu is not None:
        return PairSizes(menu.nbytes, menu.pair_bytes)
    whole = 2 * head_dim * ELEMENT_SIZE
    return PairSizes(torch.tensor([0, whole]), whole)


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
    if press.scope != "global" or not routers.config.num_heads:
        raise SettingError(
            "budget",
            press.scope,
            "'global' with max_kl",
            "Its heads cannot share a budget. Use trained routers.",
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
    if not press.menu and promise.about.get("min_pairs") != MIN_PAIRS:
        raise SettingError(
            "max_kl",
            press.max_kl,
            f"routers that were calibrated while each head keeps at least {MIN_PAIRS} pairs (theirs: "
            f"{promise.about.get('min_pairs', 0)})",
            "Run kvpress-moe calibrate --precision none.",
        )
    promise.check(press.max_kl, press.confidence)
    return promise


def decide(
    promise: Promise,
    sight: Sight,
    max_kl: float,
    confidence: float,
    bounds: tuple[int | None, int | None],
    n_heads: int,
    smallest: int,
    has_whole: bool,
) -> Decision:
    """
    What a row keeps.

    Parameters
    ----------
    promise : Promise
    sight : Sight
    max_kl, confidence : float
    bounds : (int or None, int or None)
        Smallest and largest number of bytes.
    n_heads : int
        Number of heads of all layers.
    smallest : int
        Bytes of a head that keeps one pair.
    has_whole : bool
        Whether pairs may stay as the model wrote them.

    Raises
    ------
    SettingError
        If ``max_bytes`` is less than what one pair of each head takes.
    """
    (low, high), full = bounds, sight.full_bytes
    if high is not None and high < n_heads * smallest:
        raise SettingError(
            "max_bytes",
            high,
            f"at least {n_heads * smallest} bytes, one pair of each head",
            "Raise it, or leave it out.",
        )
    least = 0.0 if low is None else min(1.0, low / full)
    most = 1.0 if high is None or high >= full else high / full
    return promise.decide(sight, max_kl, confidence, least, most, has_whole)


def report_of(
    promise: Promise, sight: Sight, max_kl: float, confidence: float, decision: Decision, n_tokens: int
) -> dict[str, Any]:
    """What was chosen and expected, as plain data for the statistics."""
    return {
        "max_kl": max_kl,
        "confidence": confidence,
        **decision._asdict(),
        "n_tokens": n_tokens,
        "shares": promise.shares.tolist(),
        "expected_kls": promise.curve(sight).tolist(),
    }
