"""Score cache: scores of the current layer, computed once for all methods that use them."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import Any

from kvpress import ScorerPress
from torch import Tensor

from kvpress_moe.experts.kvpress_scorers import draws_numbers, reads_ratio
from kvpress_moe.model.layers import Attention
from kvpress_moe.press.moe_router_press import MoERouterPress


class ScoreCache:
    """
    Scores of the current layer. A scorer inside several wrappers, or with several ratios, runs only once.

    Scorers that read the ratio are not cached. Scorers that draw random numbers share nothing with other presses,
    because a draw depends on the draws before it.
    """

    def __init__(self) -> None:
        self._scores: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        self._scores.clear()

    def remember(self, scorer: ScorerPress) -> ScorerPress:
        """Make this scorer (ours: its experts) look up earlier scores. Returns the same scorer."""
        if isinstance(scorer, MoERouterPress):
            return self._remember_experts(scorer)
        if reads_ratio(scorer) or hasattr(scorer.score, "__wrapped__"):
            return scorer
        score = scorer.score

        @wraps(score)
        def remembered(
            module: Attention, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
        ) -> Any:
            inputs = kwargs["hidden_states"].untyped_storage().data_ptr()
            if hidden_states.untyped_storage().data_ptr() != inputs:  # a gathered copy: its tokens are unknown
                return score(module, hidden_states, keys, values, attentions, kwargs)
            # a slice of the layer's inputs identifies the keys, since presses score before they change keys
            about = (settings_of(scorer), type(module), hidden_states.data_ptr(), hidden_states.shape, keys.shape)
            if about not in self._scores:
                self._scores[about] = score(module, hidden_states, keys, values, attentions, kwargs)
            return self._scores[about]

        object.__setattr__(scorer, "score", remembered)
        return scorer

    def _remember_experts(self, press: MoERouterPress) -> MoERouterPress:
        mix = press.mix

        @wraps(mix)
        def remembered(*arguments: Any) -> Tensor:
            for expert in press._experts:  # may have changed: a press chooses its experts when it sees a model
                if isinstance(expert.scorer, ScorerPress):
                    self.remember(expert.scorer)
            return mix(*arguments)

        object.__setattr__(press, "mix", remembered)
        return press


def settings_of(scorer: ScorerPress) -> tuple[Any, ...]:
    """A key that is the same for scorers that give the same scores."""
    if draws_numbers(scorer):
        return (id(scorer),)
    settings = ((f.name, getattr(scorer, f.name)) for f in fields(scorer) if f.name != "compression_ratio")
    return (type(scorer), repr(sorted(settings)))
