"""The registry of experts: names, sets of names, and an expert from whatever a user may write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import kvpress
from kvpress import ScorerPress

from kvpress_moe.errors import SettingError
from kvpress_moe.experts.builtin import LearnedScorer, score_selective, score_temporal
from kvpress_moe.experts.expert import Expert, OwnExpert, ScoreFunction
from kvpress_moe.experts.kvpress_scorers import (
    KVPRESS_EXPERTS,
)
from kvpress_moe.experts.windows import score_window, window_keep_fraction

#: The guide's table, in its order. ``experts=None`` takes the first ``num_experts`` of it.
NAMED_EXPERTS = (
    "aggressive",
    "moderate",
    "conservative",
    "selective",
    "ultra_aggressive",
    "semantic_aware",
    "temporal_aware",
    "adaptive",
)


DEFAULT_NUM_EXPERTS = 4  # the guide's

#: Sets that a single name stands for.
EXPERT_SETS = {
    "guide": NAMED_EXPERTS,
    "strong": ("leverage", "cur", "non_causal", "keydiff"),
}


def named_expert(name: str) -> Expert:
    """A fresh expert by its registered name."""
    if name in ("aggressive", "moderate", "conservative", "ultra_aggressive", "adaptive"):
        return OwnExpert(name, partial(score_window, name=name), partial(window_keep_fraction, name), registered=True)
    if name == "selective":
        return OwnExpert(name, score_selective, registered=True)
    if name == "semantic_aware":
        return Expert(name, kvpress.KeyDiffPress(), registered=True)
    if name == "learned":
        return LearnedScorer()
    if name == "temporal_aware":
        return OwnExpert(name, score_temporal, registered=True)
    if name in KVPRESS_EXPERTS:
        return Expert(name, KVPRESS_EXPERTS[name](), registered=True)
    raise SettingError(
        "experts",
        name,
        f"one of {', '.join(sorted((*NAMED_EXPERTS, *KVPRESS_EXPERTS, 'learned')))}",
        "A name of your own needs a subclass that overrides `_apply_expert_compression`.",
    )


def make_expert(given: str | ScorerPress | ScoreFunction | Expert) -> Expert:
    """
    An expert from what a user may write: a name, a kvpress scorer, or a function.

    A scorer's own keep fraction is ``1 - compression_ratio``, read when the expert is made; a function's is one half.
    """
    if isinstance(given, Expert):
        return given
    if isinstance(given, str):
        return named_expert(given)
    if isinstance(given, ScorerPress):
        ratio = getattr(given, "compression_ratio", None)
        return Expert(type(given).__name__, given, 0.5 if ratio is None else 1 - ratio)
    if callable(given) and not isinstance(given, (type, kvpress.BasePress)):
        return Expert(getattr(given, "__name__", type(given).__name__), given)
    remedy = "Give scorers as instances, not classes." if isinstance(given, type) else ""
    if isinstance(given, kvpress.BasePress):
        remedy = f"{type(given).__name__} does not score pairs; wrap it around MoERouterPress instead."
    raise SettingError(
        "experts", given, "a name, a kvpress ScorerPress or a function", remedy or "See docs/guide.en.md."
    )


def expert_specs(experts: str | Iterable[Any] | None, num_experts: int | None) -> Sequence[Any]:
    """What ``experts=`` stands for: a set's names, the given list, or the first ``num_experts`` of the table (4)."""
    if experts is None:
        return NAMED_EXPERTS[: DEFAULT_NUM_EXPERTS if num_experts is None else num_experts]
    if isinstance(experts, str):
        if experts not in EXPERT_SETS:
            raise SettingError(
                "experts", experts, f"a set ({', '.join(EXPERT_SETS)}) or a list of experts", f"Write [{experts!r}]."
            )
        return EXPERT_SETS[experts]
    return list(experts)


def parse_experts(experts: str | None) -> str | list[str] | None:
    """``"guide"`` stays a set's name; ``"knorm,tova"`` becomes a list."""
    if experts is None or experts.strip() in ("guide", "strong"):
        return experts and experts.strip()
    return [name.strip() for name in experts.split(",")]
