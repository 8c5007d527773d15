"""What each setting of the press accepts. The checks run whenever a setting is set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from kvpress_moe.codes.precision import menu_of
from kvpress_moe.errors import SettingError
from kvpress_moe.routers import ROUTERS, Routers


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any, low: float, high: float, closed_high: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return False
    number = cast(float, value)
    return low <= number <= high if closed_high else low <= number < high


def _require(condition: bool, field: str, got: Any, expected: str, remedy: str) -> None:
    if not condition:
        raise SettingError(field, got, expected, remedy)


def check_num_experts(value: Any) -> None:
    right = value is None or (_is_whole(value) and value >= 1)
    _require(
        right, "num_experts", value, "a whole number, at least 1, or None", "None means 4, or the number of `experts`."
    )


def check_top_k(value: Any) -> None:
    right = value is None or (_is_whole(value) and value >= 1)
    _require(
        right, "top_k", value, "a whole number from 1 to num_experts, or None", "None means 2, or the routers' top_k."
    )


def check_capacity_factor(value: Any) -> None:
    _require(
        _is_number(value, 1.0, math.inf),
        "capacity_factor",
        value,
        "a finite number, at least 1",
        "Below 1 the experts together cannot take every token.",
    )


def check_dropout(value: Any) -> None:
    _require(_is_number(value, 0, 1), "dropout", value, "a number in [0, 1)", "The default is 0.1.")


def check_router_type(value: Any) -> None:
    names = " or ".join(repr(name) for name in ROUTERS)
    _require(isinstance(value, str) and value in ROUTERS, "router_type", value, names, "The default is 'pikv'.")


def check_cache_aware(value: Any) -> None:
    _require(isinstance(value, bool), "cache_aware", value, "True or False", "Only router_type='pikv' uses it.")


def check_track_misses(value: Any) -> None:
    _require(isinstance(value, bool), "track_misses", value, "True or False", "True keeps evicted keys on the CPU.")


def check_budget(value: Any) -> None:
    scopes = ("uniform", "layer", "global")
    expected = " or ".join(map(repr, scopes))
    _require(value is None or value in scopes, "budget", value, expected, "None chooses by the routers.")


def check_min_share(value: Any) -> None:
    _require(_is_number(value, 0, 1, closed_high=True), "min_share", value, "a number in [0, 1]", "The default is 0.2.")


def check_precision(value: Any) -> None:
    if value is not None:
        menu_of(value)


def check_max_kl(value: Any) -> None:
    right = value is None or (_is_number(value, 0, math.inf) and value > 0)
    _require(
        right,
        "max_kl",
        value,
        "a finite number above 0, the largest mean KL divergence in nats, or None",
        "For example 0.02. None: compression_ratio decides.",
    )


def check_confidence(value: Any) -> None:
    _require(
        _is_number(value, 0, 1) and value > 0,
        "confidence",
        value,
        "a number between 0 and 1",
        "0.9: nine prompts of ten stay within max_kl.",
    )


def check_bytes(field: str, value: Any) -> None:
    right = value is None or (_is_whole(value) and value >= 1)
    _require(right, field, value, "a whole number of bytes, at least 1, or None", "None sets no bound.")


def check_promise(settings: Mapping[str, Any], default_ratio: float | None) -> None:
    """
    Raise if a promise cannot be kept together with the other settings.

    Parameters
    ----------
    settings : mapping
        Settings of a press, by name.
    default_ratio : float or None
        The press's compression ratio if none is given.
    """
    low, high, promised = settings["min_bytes"], settings["max_bytes"], settings["max_kl"] is not None
    for field in ("min_bytes", "max_bytes"):
        _require(
            promised or settings[field] is None,
            field,
            settings[field],
            "None without max_kl",
            "Set max_kl, or choose the size with compression_ratio.",
        )
    _require(
        low is None or high is None or low <= high,
        "min_bytes",
        low,
        f"at most max_bytes = {high}",
        "Lower min_bytes, or raise max_bytes.",
    )
    if not promised:
        return
    _require(
        settings["compression_ratio"] == default_ratio,
        "compression_ratio",
        settings["compression_ratio"],
        "none with max_kl, which decides how much each prompt keeps",
        "Leave it out. Use max_bytes or min_bytes for hard bounds.",
    )
    _require(
        settings["budget"] in (None, "global"),
        "budget",
        settings["budget"],
        "'global' or None with max_kl",
        "The estimate of the KL divergence is made for a budget that all heads share.",
    )
    _require(
        not settings["track_misses"], "track_misses", True, "False with max_kl", "Its budget is shared by all heads."
    )


def check_tracking(track_misses: bool, budget: str | None, precision: Any = None) -> None:
    """Raise if ``track_misses`` is on with a budget that heads share, or with a precision."""
    _require(
        not (track_misses and precision is not None),
        "track_misses",
        track_misses,
        "False with a precision",
        "Use precision=None.",
    )
    _require(
        not (track_misses and budget not in (None, "uniform")),
        "track_misses",
        track_misses,
        "False with a budget that heads share",
        "Use budget='uniform'.",
    )


def check_compression_ratio(value: Any) -> None:
    _require(
        value is None or _is_number(value, 0, 1),
        "compression_ratio",
        value,
        "a number in [0, 1), the share of pairs (with a precision: of bytes) to remove, or None",
        "0.5 keeps half. With None, each expert's own keep fraction decides.",
    )


def check_aux_loss_weight(value: Any) -> None:
    _require(
        _is_number(value, 0, math.inf), "aux_loss_weight", value, "a finite number, at least 0", "The default is 0.01."
    )


def check_experts(value: Any) -> None:
    _require(
        value is None or isinstance(value, Iterable),
        "experts",
        value,
        "a set's name, a list of experts or None",
        "Put a single expert into a list.",
    )


def check_router(value: Any) -> None:
    _require(
        value is None or (isinstance(value, (str, Path)) and str(value) != "") or isinstance(value, Routers),
        "router",
        value,
        "a directory, a hub id, a Routers object or None",
        "None takes the routers that ship for the model, else untrained ones.",
    )


CHECKS: dict[str, Callable[[Any], None]] = {
    "num_experts": check_num_experts,
    "top_k": check_top_k,
    "capacity_factor": check_capacity_factor,
    "dropout": check_dropout,
    "router_type": check_router_type,
    "cache_aware": check_cache_aware,
    "compression_ratio": check_compression_ratio,
    "aux_loss_weight": check_aux_loss_weight,
    "experts": check_experts,
    "router": check_router,
    "track_misses": check_track_misses,
    "budget": check_budget,
    "min_share": check_min_share,
    "precision": check_precision,
    "max_kl": check_max_kl,
    "confidence": check_confidence,
    "max_bytes": partial(check_bytes, "max_bytes"),
    "min_bytes": partial(check_bytes, "min_bytes"),
}


def check_top_k_fits(top_k: int, num_experts: int) -> None:
    """Raise if ``top_k`` is larger than the number of experts."""
    _require(
        top_k <= num_experts,
        "top_k",
        top_k,
        f"at most num_experts = {num_experts}",
        "Lower top_k first, or raise num_experts.",
    )


def check_number_of_experts(num_experts: int, n_named: int, given: bool) -> None:
    """Raise if ``num_experts`` exceeds the default table, or differs from the length of the list that was given."""
    if given:
        _require(
            num_experts == n_named,
            "num_experts",
            num_experts,
            f"the number of `experts` given, {n_named}",
            "Leave num_experts out: the list decides.",
        )
    else:
        _require(
            num_experts <= n_named,
            "num_experts",
            num_experts,
            f"at most the {n_named} experts of the default table",
            "Name more with `experts=[...]`.",
        )


def check_strategies(strategies: Mapping[int, object], num_experts: int) -> None:
    """Raise unless there is one strategy for each expert."""
    _require(
        set(strategies) == set(range(num_experts)),
        "expert_strategies",
        dict(strategies),
        f"one entry for each of the {num_experts} experts, numbered from 0",
        "Set num_experts first, or change single entries.",
    )
