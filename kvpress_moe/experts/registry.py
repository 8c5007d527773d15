"""The registry of experts: names, sets of names, and building an expert from what a user gives."""

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

#: The default table, in its order. ``experts=None`` takes the first ``num_experts`` of it.
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


DEFAULT_NUM_EXPERTS = 4

#: Named sets: name -> the names of its experts.
EXPERT_SETS = {
    "guide": NAMED_EXPERTS,
    "strong": ("leverage", "cur", "non_causal", "keydiff"),
}


def named_expert(name: str) -> Expert:
    """A new expert, from its registered name."""
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
    Build an expert from what a user gives: a name, a kvpress scorer, or a function.

    The own keep fraction of a scorer is ``1 - compression_ratio``, read when the expert is built. That of a function is
    0.5.
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
    """What ``experts=`` means: a set's names, the given list, or the first ``num_experts`` (or 4) of the table."""
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
    """Parse the value of a command's option: ``"guide"`` stays a set's name, ``"knorm,tova"`` becomes a list."""
    if experts is None or experts.strip() in ("guide", "strong"):
        return experts and experts.strip()
    return [name.strip() for name in experts.split(",")]
