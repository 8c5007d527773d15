"""The same protection for all methods: the first and the last tokens of a context always stay."""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

import torch
from kvpress import ScorerPress

from kvpress_moe.errors import SettingError
from kvpress_moe.press.moe_router_press import MoERouterPress

Press = TypeVar("Press", bound=ScorerPress)


def protect(press: Press, sinks: int, recent: int) -> Press:
    """
    Make a scorer rank the first ``sinks`` and the last ``recent`` pairs above all others; returns the same press.

    Only the method ``score`` (ours: ``mix``) of this instance changes, so that presses with a selection of their own
    (PyramidKV) and wrappers (AdaKV, ChunkKV, …) around it are protected too.

    Raises
    ------
    SettingError
        If a count is negative.
    """
    for field, count in (("sinks", sinks), ("recent", recent)):
        if count < 0:
            raise SettingError(field, count, "0 or more tokens", "0 protects nothing.")
    if not sinks and not recent:
        return press
    name = "mix" if isinstance(press, MoERouterPress) else "score"  # its compress calls mix
    score = getattr(press, name)

    @wraps(score)
    def protected(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores: torch.Tensor = score(*args, **kwargs).clone()
        highest = torch.finfo(scores.dtype).max
        scores[..., :sinks] = highest
        scores[..., max(0, scores.shape[-1] - recent) :] = highest
        return scores

    object.__setattr__(press, name, protected)
    return press
