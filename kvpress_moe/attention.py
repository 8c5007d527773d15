"""Attention of the latest queries over cached keys: what experts judge by, and what hit rates are counted with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

if TYPE_CHECKING:
    from kvpress_moe.layer_call import LayerCall


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states (B, heads, Q, D) by cos and sin (B or 1, Q, R); where R < D only the first R dimensions turn."""
    cos, sin = cos[:, None], sin[:, None]
    turning, fixed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    return torch.cat((turning * cos + rotate_half(turning) * sin, fixed), dim=-1)


def scaled_products(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention logits of queries (B, num_heads, Q, D) over keys (B, H, S, D): (B, num_heads, Q, S), float32."""
    grouped = queries.reshape(keys.shape[0], keys.shape[1], -1, keys.shape[-1])  # no copy of keys per query head
    return (grouped @ keys.transpose(2, 3)).float().mul_(scaling).view(*queries.shape[:3], keys.shape[2])


def causal_logits(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """
    Logits of the newest Q tokens over all S, each seeing itself and what came before.

    Parameters
    ----------
    queries : Tensor, shape (B, num_heads, Q, D)
    keys : Tensor, shape (B, H, S, D)
    scaling : float
        The layer's own scaling of logits.

    Returns
    -------
    Tensor, shape (B, num_heads, Q, S), float32
        Minus infinity where a key comes after the query.
    """
    q_len, k_len = queries.shape[2], keys.shape[2]
    future = torch.ones(q_len, k_len, dtype=torch.bool, device=keys.device).triu(k_len - q_len + 1)
    return scaled_products(queries, keys, scaling).masked_fill_(future, -torch.inf)


def latest_queries(call: LayerCall, n_queries: int) -> Tensor:
    """Rotated queries of the newest tokens, shape (B, num_heads, n_queries, D)."""
    states = get_prerope_query_states(call.view, call.hidden_states[:, -n_queries:])
    cos, sin = call.position_embeddings
    return apply_rope(states, cos[:, -n_queries:], sin[:, -n_queries:])


def window_attention_mass(call: LayerCall) -> Tensor:
    """Mean attention of the call's window of latest queries, per query head: (B, num_heads, S), float32."""
    if call.attentions is not None and call.attentions.shape[-1] == call.k_len:
        return call.attentions[..., -call.window :, :].float().mean(dim=-2)
    logits = causal_logits(latest_queries(call, call.window), call.keys, call.module.scaling)
    return logits.softmax(dim=-1).mean(dim=-2)


def per_kv_head(mass: Tensor, num_key_value_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: (B, num_heads, S) -> (B, H, S)."""
    by_head: Tensor = mass.unflatten(1, (num_key_value_heads, -1))
    return by_head.mean(dim=2)
