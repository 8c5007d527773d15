"""Expert: one judge of KV pairs, with any kind of scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kvpress import ScorerPress
from torch import Tensor

from kvpress_moe.errors import ExpertError
from kvpress_moe.experts.kvpress_scorers import (
    exact_pairs,
    fitting_settings,
    known_attentions,
    reads_ratio,
    same_sketch,
    temporarily,
)
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers import Routing

ScoreFunction = Callable[..., Tensor]


@dataclass(eq=False)
class Expert:
    """
    One judge of KV pairs.

    Parameters
    ----------
    name : str
        Name of the expert in ``expert_strategies`` and in the statistics.
    scorer : ScorerPress or callable
        A kvpress scorer. Or ``f(module, hidden_states, keys, values, attentions, kwargs) -> (B, H, S)``, which has the
        signature of ``ScorerPress.score``.
    keep : float or callable
        Share of the pairs that the expert keeps if ``compression_ratio=None``, or a function of the prompt's length.
    registered : bool, default=False
        Whether the expert can be built again from its name alone.
    """

    name: str
    scorer: ScorerPress | ScoreFunction
    keep: float | Callable[[int], float] = 0.5
    registered: bool = False

    @property
    def spec(self) -> str | ScorerPress | ScoreFunction:
        """What to pass to ``experts=`` to get this expert again."""
        return self.name if self.registered else self.scorer

    @property
    def reads_ratio(self) -> bool:
        """Whether its scores may change with the compression ratio. Functions do not get the ratio."""
        return isinstance(self.scorer, ScorerPress) and reads_ratio(self.scorer)

    def keep_fraction(self, k_len: int) -> float:
        return self.keep(k_len) if callable(self.keep) else self.keep

    def score(
        self,
        call: LayerCall,
        compression_ratio: float | None,
        routing: Routing | None = None,
        ranks: Tensor | None = None,
    ) -> Tensor:
        """
        Judge all pairs of a call.

        Parameters
        ----------
        call : LayerCall
        compression_ratio : float or None
            Set on a kvpress scorer during the call. The scores of StreamingLLM, Compactor and CriticalKV depend on it.
            ``None`` leaves the scorer's own ratio.
        routing : Routing, optional
            For experts that use the router or its weights: ``learned`` and those of a subclass.
        ranks : Tensor, shape (B, other experts, H, S), optional
            Ranks within the head by the other experts, for ``learned``.

        Returns
        -------
        Tensor, shape (B, H, S)
            Higher = keep.

        Raises
        ------
        ExpertError
            If the scorer fails, or returns a wrong shape or NaN.
        """
        if call.k_len == 1:
            return call.keys.new_zeros(call.keys.shape[:3])  # nothing to compare; several scorers fail on one pair
        try:
            scores = self._score(call, compression_ratio, routing, ranks)
        except (ExpertError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ExpertError(
                f"expert {self.name!r} failed on layer {call.layer_idx} with {call.k_len} pairs and hidden states of "
                f"{call.q_len} tokens: {str(error) or type(error).__name__}. Leave it out of `experts`."
            ) from error
        if scores.shape != call.keys.shape[:3]:
            raise ExpertError(
                f"expert {self.name!r} returned scores of shape {tuple(scores.shape)}, expected (batch, KV heads, "
                f"pairs) = {tuple(call.keys.shape[:3])}. It cannot judge this call; leave it out of `experts`."
            )
        if bool(scores.isnan().any()):
            raise ExpertError(
                f"expert {self.name!r} scored NaN on layer {call.layer_idx}. Check the model's dtype "
                f"({call.keys.dtype}) or leave the expert out of `experts`."
            )
        return scores

    def _score(
        self, call: LayerCall, compression_ratio: float | None, routing: Routing | None, ranks: Tensor | None
    ) -> Tensor:
        if not isinstance(self.scorer, ScorerPress):
            return self.scorer(
                call.view, call.hidden_states, call.keys, call.values, call.attentions, call.expert_kwargs
            )
        settings = fitting_settings(self.scorer, call)
        if compression_ratio is not None:
            settings["compression_ratio"] = compression_ratio
        with temporarily(self.scorer, settings), same_sketch(self.scorer, call):
            attentions, (keys, values) = known_attentions(self.scorer, call), exact_pairs(self.scorer, call)
            arguments = (call.view, call.hidden_states, keys, values, attentions, call.expert_kwargs)
            scores: Tensor = self.scorer.score(*arguments)
        return scores


class OwnExpert(Expert):
    """An expert of this package. Its scorer takes the LayerCall, so that it can use what is computed there already."""

    def _score(
        self, call: LayerCall, compression_ratio: float | None, routing: Routing | None, ranks: Tensor | None
    ) -> Tensor:
        return self.scorer(call)
