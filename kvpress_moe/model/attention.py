"""Attention of the latest queries over cached keys. Experts use it, and hit rates are counted with it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from kvpress_moe.model.layers import Attention


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states (B, heads, Q, D) by cos and sin (B or 1, Q, R). If R < D, only the first R dimensions rotate."""
    cos, sin = cos[:, None], sin[:, None]
    turning, fixed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    return torch.cat((turning * cos + rotate_half(turning) * sin, fixed), dim=-1)


def softcap(module: Attention) -> float | None:
    """
    The soft cap that an attention layer applies to its logits (Gemma 2). None if it applies none.

    transformers' SDPA attention applies none, whatever the configuration says.
    """
    config = module.config
    cap: float | None = getattr(config, "attn_logit_softcapping", None)
    return None if config._attn_implementation == "sdpa" else cap


def apply_softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits with a soft cap, between ``-cap`` and ``cap``. With None they are unchanged."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def layer_logits(module: Attention, queries: Tensor, keys: Tensor) -> Tensor:
    """
    A layer's logits of queries (B, num_heads, Q, D) over keys (B, H, S, D): (B, num_heads, Q, S), float32.

    The layer's own scaling and soft cap are applied.
    """
    grouped = queries.reshape(keys.shape[0], keys.shape[1], -1, keys.shape[-1])  # no copy of keys per query head
    logits = (grouped * module.scaling @ keys.transpose(2, 3)).float().view(*queries.shape[:3], keys.shape[2])
    return apply_softcap(logits, softcap(module))


def causal_logits(module: Attention, queries: Tensor, keys: Tensor) -> Tensor:
    """
    Logits of the newest Q tokens over all S tokens. Each token sees itself and the tokens before it.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    queries : Tensor, shape (B, num_heads, Q, D)
    keys : Tensor, shape (B, H, S, D)

    Returns
    -------
    Tensor, shape (B, num_heads, Q, S), float32
        Minus infinity where a key comes after the query.
    """
    q_len = queries.shape[2]
    logits = layer_logits(module, queries, keys)
    future = torch.ones(q_len, q_len, dtype=torch.bool, device=keys.device).triu(1)  # all queries see the earlier keys
    logits[..., -q_len:].masked_fill_(future, -torch.inf)
    return logits


def per_kv_head(mass: Tensor, num_key_value_heads: int) -> Tensor:
    """Mean over the query heads that share a KV head: (B, num_heads, S) -> (B, H, S)."""
    by_head: Tensor = mass.unflatten(1, (num_key_value_heads, -1))
    return by_head.mean(dim=2)


def hides_tokens(mask: Tensor) -> bool:
    """Whether a mask (B, 1, Q, S), bool or additive, hides any of the S tokens from the newest one, as padding does."""
    newest = mask[:, 0, -1]
    return not bool((newest if newest.dtype == torch.bool else newest == 0).all())
