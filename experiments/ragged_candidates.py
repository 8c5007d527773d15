"""
Other ways to compute ragged attention on a GPU; ``experiments/ragged_cache.py`` measures them beside the package's own.

In both, the kernel of a library processes the kept pairs without a copy, and plain PyTorch processes the few newer
tokens. The two results are combined with their sums of exponentials. Only the fastest one on a GPU belongs in the
package.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from kvpress_moe.cache import RaggedLayer
from kvpress_moe.cache.torch_backend import newest_logits
from kvpress_moe.model.attention import apply_softcap


def flash_attention(query: Tensor, layer: RaggedLayer, scaling: float, cap: float | None = None) -> Tensor:
    """
    flash-attn's function for sequences of different lengths, as torch ships it. Each head is a sequence.

    The G·Q queries of a head form one sequence with one head, so that its pairs are loaded once. Only float16 and
    bfloat16 on CUDA, without a soft cap.
    """
    from torch.nn.attention import varlen  # of torch 2.10

    if cap is not None:
        raise ValueError("flash-attn's function in torch has no soft cap of the logits")
    grouped, logits = newest_logits(query, layer, scaling, cap)
    n_heads, n_rows, head_dim = grouped.shape
    lengths = list(chain.from_iterable(layer.lengths))
    bounds = _on_device(tuple(accumulate(lengths, initial=0)), query.device)
    queries_at = torch.arange(0, n_heads * n_rows + 1, n_rows, dtype=torch.int32, device=query.device)
    kept, logs = varlen.varlen_attn(
        grouped.reshape(-1, 1, head_dim),
        layer.flat_keys[:, None],
        layer.flat_values[:, None],
        queries_at,
        bounds,
        n_rows,
        max(lengths),
        scale=1.0,  # the queries are scaled
        return_aux=varlen.AuxRequest(lse=True),
    )
    empty = (bounds.diff() == 0)[:, None]  # the kernel reports plus infinity as their sum of exponentials
    logs = logs.view(n_heads, n_rows).masked_fill(empty, -torch.inf)
    return _with_newest(kept.view_as(grouped), logs, logits, layer, query)


def flex_attention(query: Tensor, layer: RaggedLayer, scaling: float, cap: float | None = None) -> Tensor:
    """FlexAttention: all heads are one sequence. Queries see only the pairs of their own head."""
    grouped, logits = newest_logits(query, layer, scaling, cap)
    n_heads, n_rows, head_dim = grouped.shape
    mask = _own_heads(tuple(chain.from_iterable(layer.lengths)), n_rows, query.device)
    kept, aux = _flex(query.device.type)(
        grouped.reshape(1, 1, -1, head_dim),
        layer.flat_keys[None, None],
        layer.flat_values[None, None],
        score_mod=None if cap is None else lambda score, *_: apply_softcap(score, cap),
        block_mask=mask,
        scale=1.0,
        return_aux=flex.AuxRequest(lse=True),
    )
    return _with_newest(kept.view_as(grouped), aux.lse.view(n_heads, n_rows), logits, layer, query)


def _with_newest(kept: Tensor, logs: Tensor, logits: Tensor, layer: RaggedLayer, query: Tensor) -> Tensor:
    """
    Combine attention over kept pairs with attention over the newest tokens.

    Parameters
    ----------
    kept : Tensor, shape (B·H, G·Q, D)
        Attention over the kept pairs.
    logs : Tensor, shape (B·H, G·Q)
        Logarithm of the sum of exponentials by which ``kept`` was divided.
    logits : Tensor, shape (B·H, G·Q, T)
        Logits of the newest tokens.
    """
    newest = logits.softmax(-1).to(query.dtype) @ layer.new_values.flatten(0, 1)
    share = torch.sigmoid(logs - logits.logsumexp(-1))[..., None]
    output = torch.lerp(newest.float(), kept.float(), share).to(query.dtype)
    return output.view(query.shape).transpose(1, 2)


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@cache
def _own_heads(lengths: tuple[int, ...], n_rows: int, device: torch.device) -> flex.BlockMask:
    of_pair = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    of_query = torch.arange(len(lengths), device=device).repeat_interleave(n_rows)

    def own_head(batch: Tensor, head: Tensor, asking: Tensor, asked: Tensor) -> Tensor:
        return of_query[asking] == of_pair[asked]

    return flex.create_block_mask(own_head, 1, 1, len(of_query), len(of_pair), device=device)


@cache
def _flex(device_type: str):
    """
    FlexAttention, compiled on a GPU; uncompiled on a CPU, where the compiled one does not return the sums.

    On a GPU it is an error if the graph breaks or is compiled too often: times of uncompiled code would mean nothing.
    """
    if device_type != "cuda":
        return flex.flex_attention
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


def forget() -> None:
    """Free what is stored about the caches of a model."""
    _on_device.cache_clear()
    _own_heads.cache_clear()
