"""LayerCall: one call of a press on one layer. What several experts need is computed once in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor
from transformers import Cache

from kvpress_moe.model.attention import apply_rope, causal_logits
from kvpress_moe.model.attention_view import AttentionView, slice_start
from kvpress_moe.model.layers import Attention

WINDOW = 64  # the latest queries, as in SnapKV


@dataclass(eq=False)
class LayerCall:
    """
    The six arguments of ``ScorerPress.score``, and what is known about the tokens that they belong to.

    Wrappers pass different things. Ordinary presses pass all tokens. ChunkPress passes slices of hidden states, keys
    and values, but whole position embeddings. DecodingPress passes the newest hidden states, all keys, and the position
    embeddings of the current step. BlockPress passes gathered hidden states. ComposedPress passes keys that were
    already pruned. This class handles these cases, so that no other code has to.

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
    projected : dict of str -> Tensor (B, Q, …)
        What the layer projected from the hidden states in its own forward, by the name of the projection.
    row : int
        Index of the row in the batch, if this call is one row of a padded batch.
    """

    module: Attention
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    attentions: Tensor | None
    kwargs: Mapping[str, Any]
    projected: dict[str, Tensor] = field(default_factory=dict)
    row: int = 0

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
        """Position of the first given hidden state among the layer's inputs. None if they are not a slice of them."""
        inputs, given = self.kwargs.get("hidden_states"), self.hidden_states
        if inputs is None or given is inputs:
            return 0
        return slice_start(inputs, given)

    @property
    def gathered(self) -> bool:
        """Whether the hidden states were picked from a prompt and it is unknown which tokens they belong to."""
        inputs = self.kwargs.get("hidden_states")
        return self.offset is None and inputs is not None and inputs.shape[1] > self.q_len

    @cached_property
    def distances(self) -> Tensor:
        """
        How many tokens come after each pair, (B or 1, S).

        All are 0 where this is not known: if a wrapper gathered the tokens, or if the cache holds more than the given
        tokens. What is left of a cache need not be in the prompt's order.
        """
        given = self.kwargs.get("position_ids")
        if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == self.k_len == self.q_len:
            distances: Tensor = given[:, -1:] - given
            return distances
        if self.gathered or self.q_len != self.k_len:
            return torch.zeros(1, self.k_len, dtype=torch.long, device=self.keys.device)
        counted = torch.arange(self.k_len - 1, -1, -1, device=self.keys.device)[None]
        inputs = self.kwargs.get("hidden_states")
        if inputs is None or self.offset is None:
            return counted
        after: int = inputs.shape[1] - self.offset - self.q_len  # 0, except for a slice of a prompt
        return counted + after

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
        """The attention layer as experts see it. It projects these hidden states once for all experts."""
        return AttentionView(self.module, self.hidden_states, self.projected)

    @cached_property
    def expert_kwargs(self) -> dict[str, Any]:
        """``kwargs`` with the position embeddings of the given hidden states."""
        if "position_embeddings" not in self.kwargs:
            return dict(self.kwargs)
        return {**self.kwargs, "position_embeddings": self.position_embeddings}

    @cached_property
    def window(self) -> int:
        """Number of latest queries that are observed: 64, but at most half of the cached tokens."""
        return max(1, min(WINDOW, self.k_len // 2, self.q_len))

    @cached_property
    def window_mass(self) -> Tensor:
        """Mean attention that each query head's latest queries pay to every pair: (B, num_heads, S), float32."""
        return window_attention_mass(self)


def latest_queries(call: LayerCall, n_queries: int) -> Tensor:
    """Rotated queries of the newest tokens, shape (B, num_heads, n_queries, D)."""
    states = get_prerope_query_states(call.view, call.hidden_states[:, -n_queries:])
    cos, sin = call.position_embeddings
    return apply_rope(states, cos[:, -n_queries:], sin[:, -n_queries:])


def latest_attention(call: LayerCall, n_queries: int) -> Tensor:
    """Attention of the newest tokens to themselves and to earlier tokens: (B, num_heads, n_queries, S), float32."""
    return causal_logits(call.module, latest_queries(call, n_queries), call.keys).softmax(dim=-1)


def window_attention_mass(call: LayerCall) -> Tensor:
    """Mean attention of the call's window of latest queries, per query head: (B, num_heads, S), float32."""
    if call.attentions is not None and call.attentions.shape[-1] == call.k_len:
        return call.attentions[..., -call.window :, :].float().mean(dim=-2)
    return latest_attention(call, call.window).mean(dim=-2)
