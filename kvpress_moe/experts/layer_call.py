"""LayerCall: one call of a press on one layer, with what its experts share computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from kvpress_moe.model.attention import window_attention_mass
from kvpress_moe.model.attention_view import AttentionView, slice_start
from kvpress_moe.model.layers import Attention

if TYPE_CHECKING:
    from kvpress_moe.routers import BaseMoERouter

WINDOW = 64  # the latest queries, as in SnapKV
LATER: Any = None  # of a call that has not been routed yet


@dataclass(eq=False)
class LayerCall:
    """
    The six arguments of ``ScorerPress.score``, and what can be known of the tokens they are about.

    Wrappers hand over different things: ordinary presses all tokens; ChunkPress slices of hidden states, keys and
    values, but whole position embeddings; DecodingPress the newest hidden states, all keys, and the position embeddings
    of the current step; BlockPress gathered hidden states, ComposedPress keys that were already pruned. This class
    sorts them out, so that nothing behind it has to.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor, shape (B, Q, C)
        Inputs of the layer, for all cached tokens or for the newest Q.
    keys, values : Tensor, shape (B, H, S, D)
        The cached pairs that are to be judged.
    attentions : Tensor or None, shape (B, num_heads, Q, S)
        Attention weights; eager attention only.
    kwargs : mapping
        Keyword arguments of the attention layer's forward.
    weights : Tensor, shape (B, 1 or H, S, E), optional
        Routing weights of the pairs, once the call has been routed; per head only where a cache is compressed again.
    router : BaseMoERouter, optional
        The router that gave them.
    ranks : Tensor, shape (B, E, H, S), optional
        Ranks within the head that the experts besides ``learned`` gave, where they were asked already.
    projected : dict of str -> Tensor (B, Q, …)
        What the layer projected of the hidden states in its own forward, by the projection's name.
    row : int
        Of the batch, where this call is about one row of a padded one.
    active : sequence of int
        Experts with a non-zero weight somewhere, once the call has been routed.
    """

    module: Attention
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    attentions: Tensor | None
    kwargs: Mapping[str, Any]
    weights: Tensor = LATER
    router: BaseMoERouter = LATER
    ranks: Tensor = LATER
    projected: dict[str, Tensor] = field(default_factory=dict)
    row: int = 0
    active: Sequence[int] = ()

    @property
    def layer_idx(self) -> int:
        layer_idx: int = self.module.layer_idx
        return layer_idx

    @property
    def cache(self) -> Cache | None:
        """The cache that the pairs come from."""
        return self.kwargs.get("past_key_values")

    @property
    def k_len(self) -> int:
        return self.keys.shape[2]

    @property
    def q_len(self) -> int:
        return self.hidden_states.shape[1]

    @cached_property
    def offset(self) -> int | None:
        """Position of the first given hidden state among the layer's inputs; None where they are no slice of them."""
        inputs, given = self.kwargs.get("hidden_states"), self.hidden_states
        if inputs is None or given is inputs:
            return 0
        return slice_start(inputs, given)

    @property
    def gathered(self) -> bool:
        """Whether the hidden states were picked from a prompt in a way that hides which tokens they are."""
        inputs = self.kwargs.get("hidden_states")
        return self.offset is None and inputs is not None and inputs.shape[1] > self.q_len

    @cached_property
    def position_embeddings(self) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin, each (B or 1, Q, rotary dim), of the tokens whose hidden states are given."""
        cos, sin = self.kwargs["position_embeddings"]
        if cos.shape[1] == self.q_len:
            return cos, sin
        if cos.shape[1] < self.q_len:  # newest tokens, collected over several decoding steps
            positions = self.kwargs.get("position_ids")
            positions = self.kwargs["cache_position"][None] if positions is None else positions
            steps = torch.arange(1 - self.q_len, 1, device=positions.device)
            return self.view.rotary_emb(self.hidden_states, positions[:, -1:] + steps)
        start = self.offset if self.offset is not None else cos.shape[1] - self.q_len
        return cos[:, start : start + self.q_len], sin[:, start : start + self.q_len]

    @cached_property
    def view(self) -> AttentionView:
        """The attention layer as experts see it: its projections of these hidden states are computed once for all."""
        return AttentionView(self.module, self.hidden_states, self.projected)

    @cached_property
    def expert_kwargs(self) -> dict[str, Any]:
        """``kwargs`` with the position embeddings of the given hidden states."""
        if "position_embeddings" not in self.kwargs:
            return dict(self.kwargs)
        return {**self.kwargs, "position_embeddings": self.position_embeddings}

    @cached_property
    def routed(self) -> Tensor:
        """Which expert judges which pair: bool, shape of ``weights``."""
        return self.weights > 0

    @cached_property
    def window(self) -> int:
        """Number of latest queries that are observed: 64, at most half of the cached tokens."""
        return max(1, min(WINDOW, self.k_len // 2, self.q_len))

    @cached_property
    def window_mass(self) -> Tensor:
        """Attention that each query head's latest queries pay to every pair, shape (B, num_heads, S), float32, mean."""
        return window_attention_mass(self)
