"""Experts of a subclass of the press: what ``_apply_expert_compression`` returns becomes a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kvpress_moe.budget.eviction import kept_mask
from kvpress_moe.cache.key_hash import KeyIndex
from kvpress_moe.errors import ExpertError
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers import Routing

#: ``(keys, values, strategy, router_probs) -> score (B, H, S), or the (keys, values) that would be kept``
ApplyCompression = Callable[[Tensor, Tensor, str, Tensor], Any]


class CustomStrategies:
    """The method that a subclass of the press overrides to add strategies of its own, by name."""

    def _apply_expert_compression(
        self, keys: Tensor, values: Tensor, strategy: str, router_probs: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Judge pairs by a strategy that is not in the table of experts. Subclasses override this method.

        Parameters
        ----------
        keys, values : Tensor, shape (B, H, S, D)
        strategy : str
            The name that was given in ``experts`` or ``expert_strategies``.
        router_probs : Tensor, shape (B, S, E)
            Routing weights of the tokens (if heads differ, the mean over heads).

        Returns
        -------
        Tensor or (Tensor, Tensor)
            A score (B, H, S), higher = keep. Or the keys and values (B, H, K, D) that the strategy would keep, taken
            unchanged from the given ones.
        """
        raise NotImplementedError

    @property
    def _own_compression(self) -> ApplyCompression | None:
        overridden = type(self)._apply_expert_compression is not CustomStrategies._apply_expert_compression
        return self._apply_expert_compression if overridden else None


class CustomExpert(Expert):
    """
    A strategy that is not in the table of experts. A method of the press scores it.

    Parameters
    ----------
    name : str
        Name of the strategy.
    apply : callable
        ``_apply_expert_compression`` of a subclass of MoERouterPress.
    """

    def __init__(self, name: str, apply: ApplyCompression):
        super().__init__(name, apply, registered=True)

    def _score(
        self, call: LayerCall, compression_ratio: float | None, routing: Routing | None, ranks: Tensor | None
    ) -> Tensor:
        assert routing is not None, "only the press calls custom experts"
        result: Any = self.scorer(call.keys, call.values, self.name, routing.weights.mean(1))
        if isinstance(result, tuple) and len(result) == 2:
            return score_selection(result[0], call.keys, self.name)
        if isinstance(result, Tensor):
            return result
        raise ExpertError(
            f"_apply_expert_compression returned {type(result).__name__} for {self.name!r}, expected a score of shape "
            "(batch, KV heads, pairs) or a tuple (keys, values)."
        )


def score_selection(
    kept_keys: Float[Tensor, "B H K D"], keys: Float[Tensor, "B H S D"], strategy: str
) -> Float[Tensor, "B H S"]:
    """
    1 for pairs of ``keys`` that occur in ``kept_keys``, 0 for the others.

    Raises
    ------
    ExpertError
        If ``kept_keys`` contains a key that is not in ``keys``.
    """
    positions = KeyIndex(keys).find(kept_keys)
    if positions is None:
        raise ExpertError(
            f"_apply_expert_compression returned keys for {strategy!r} that it was not given. Return a selection of "
            "the given pairs, unchanged, or a score of shape (batch, KV heads, pairs)."
        )
    return kept_mask(positions, keys.shape[2]).float()
