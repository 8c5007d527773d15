"""Attention over a RaggedLayer in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.model.attention import apply_softcap

LOGITS_AT_ONCE = 2**19  # limit of the logits in memory; runs of heads with more are cut


def torch_attention(query: Tensor, layer: RaggedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """
    Attention of the newest tokens over a ragged layer. Each sees all kept pairs, and the later tokens up to itself.

    Neighbouring heads of equal length are computed together, on views of the flat tensors. So kept pairs are neither
    padded nor copied.

    Parameters
    ----------
    query : Tensor, shape (B, num_heads, Q, D)
        Queries of the layer's newest Q tokens.
    layer : RaggedPairs
        The layer. These tokens are already appended to it.
    scaling : float
    cap : float, optional
        Soft cap of the logits, see :func:`kvpress_moe.model.attention.apply_softcap`.

    Returns
    -------
    Tensor, shape (B, Q, num_heads, D)
    """
    n_batch, num_heads, q_len, head_dim = query.shape
    grouped, new_logits = newest_logits(query, layer, scaling, cap)
    new_values = layer.new_values.flatten(0, 1)
    keys, values = zip(*layer.runs(), strict=True)
    sizes = [len(run) for run in keys]
    parts = [part.split(sizes) for part in (grouped, new_logits, new_values)]
    longest = max(run.shape[1] for run in keys)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, *layer.tensors))
    if (
        new_logits[..., 0].numel() * (longest + new_logits.shape[2]) <= LOGITS_AT_ONCE and not differentiable
    ):  # attend_padded writes in place, which a gradient does not allow
        output = attend_padded(grouped, new_logits, new_values, keys, values, parts[0], longest, cap)
    else:
        runs = zip(*parts, keys, values, strict=True)
        output = torch.cat([attend(some, logits, new, k, v, cap) for some, logits, new, k, v in runs])
    return output.view(n_batch, num_heads, q_len, head_dim).transpose(1, 2)


def newest_logits(query: Tensor, layer: RaggedPairs, scaling: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """
    Queries by KV head, and their logits over the T tokens after the prompt, which no head evicts.

    Returns
    -------
    grouped : Tensor, shape (B·H, G·Q, D)
        Scaled queries.
    logits : Tensor, shape (B·H, G·Q, T), float32
        Minus infinity where a token comes after the query.
    """
    q_len, n_new = query.shape[2], layer.new_keys.shape[2]
    grouped = query.unflatten(1, (layer.new_keys.shape[1], -1)).flatten(2, 3) * scaling  # (B, H, G·Q, D)
    logits = apply_softcap((grouped @ layer.new_keys.transpose(2, 3)).float(), cap)  # (B, H, G·Q, T)
    if q_len > 1:
        future = torch.ones(q_len, n_new, dtype=torch.bool, device=query.device).triu(n_new - q_len + 1)
        logits = logits.unflatten(2, (-1, q_len)).masked_fill(future, -torch.inf).flatten(2, 3)
    return grouped.flatten(0, 1), logits.flatten(0, 1)


def attend(
    queries: Tensor, new_logits: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, cap: float | None
) -> Tensor:
    """
    Attention of one run of R heads of equal length n. If there are many logits, a few heads are computed at a time.

    Parameters
    ----------
    queries : Tensor, shape (R, G·Q, D)
        Scaled queries.
    new_logits : Tensor, shape (R, G·Q, T), float32
    new_values : Tensor, shape (R, T, D)
    keys, values : Tensor, shape (R, n, D)
    cap : float or None

    Returns
    -------
    Tensor, shape (R, G·Q, D)
    """
    n_kept = keys.shape[1]
    at_once = max(1, LOGITS_AT_ONCE // (queries.shape[1] * (n_kept + new_logits.shape[2])))
    outputs = []
    for some in zip(*(part.split(at_once) for part in (queries, new_logits, new_values, keys, values)), strict=True):
        queries, new_logits, new_values, keys, values = some
        logits = torch.cat((apply_softcap((queries @ keys.mT).float(), cap), new_logits), dim=-1)
        weights = logits.softmax(dim=-1).to(queries.dtype)
        outputs.append(torch.baddbmm(weights[..., n_kept:] @ new_values, weights[..., :n_kept], values))
    return torch.cat(outputs)


def attend_padded(
    grouped: Tensor,
    new_logits: Tensor,
    new_values: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    queries: tuple[Tensor, ...],
    longest: int,
    cap: float | None,
) -> Tensor:
    """
    The same for all heads (B·H, …) at once, with two operations for each run. Only logits are padded, never pairs.

    This is for few queries, where starting an operation takes longer than its computation.
    """
    logits = grouped.new_full((*new_logits.shape[:2], longest), -torch.inf)
    sizes = [len(run) for run in keys]
    for run, run_queries, padded in zip(keys, queries, logits.split(sizes), strict=True):
        torch.bmm(run_queries, run.mT, out=padded[..., : run.shape[1]])
    if cap is not None:
        logits = torch.where(logits == -torch.inf, logits, apply_softcap(logits.float(), cap))
    weights = torch.cat((logits.float(), new_logits), dim=-1).softmax(dim=-1).to(grouped.dtype)
    output = weights[..., longest:] @ new_values
    for run, kept, summed in zip(values, weights.split(sizes), output.split(sizes), strict=True):
        summed.baddbmm_(kept[..., : run.shape[1]], run)
    return output
