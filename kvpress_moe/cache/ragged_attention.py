"""Attention over a RaggedLayer, reached through transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress_moe.errors import UnsupportedInputError

if TYPE_CHECKING:
    from kvpress_moe.cache.ragged import RaggedLayer


LOGITS_AT_ONCE = 2**19  # what a run of heads may hold in memory; longer runs are cut


def register_ragged_attention() -> None:
    """
    Let every registered attention function recognise ragged layers; what is not ragged goes where it went before.

    Idempotent. Eager attention is not registered with transformers and cannot be reached: on a ragged layer it fails.
    """
    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        if not hasattr(function, "without_ragged"):
            ALL_ATTENTION_FUNCTIONS[name] = recognising_ragged(function)


def recognising_ragged(function: Callable) -> Callable:
    """An attention function that sends keys of a RaggedLayer to :func:`ragged_attention`."""

    @wraps(function)
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
        layer = getattr(key, "ragged_layer", None)
        if layer is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise UnsupportedInputError("dropout: attention over a RaggedCache is for inference; call model.eval().")
        return ragged_attention(query, layer, kwargs.get("scaling") or module.scaling), None

    attention.without_ragged = function
    return attention


def ragged_attention(query: Tensor, layer: RaggedLayer, scaling: float) -> Tensor:
    """
    Attention of the newest tokens over a ragged layer: each sees all kept pairs and what came since, up to itself.

    Neighbouring heads of one length are computed together, on views of the flat tensors: no padding and no copy of the
    kept pairs.

    Parameters
    ----------
    query : Tensor, shape (B, num_heads, Q, D)
        Queries of the layer's newest Q tokens.
    layer : RaggedLayer
        With those tokens appended.
    scaling : float

    Returns
    -------
    Tensor, shape (B, Q, num_heads, D)
    """
    n_batch, num_heads, q_len, head_dim = query.shape
    n_new = layer.new_keys.shape[2]
    grouped = query.unflatten(1, (layer.new_keys.shape[1], -1)).flatten(2, 3) * scaling  # (B, H, G·Q, D)
    new_logits = (grouped @ layer.new_keys.transpose(2, 3)).float()  # (B, H, G·Q, T)
    if q_len > 1:
        future = torch.ones(q_len, n_new, dtype=torch.bool, device=query.device).triu(n_new - q_len + 1)
        new_logits = new_logits.unflatten(2, (-1, q_len)).masked_fill(future, -torch.inf).flatten(2, 3)
    outputs = []
    by_head = [part.flatten(0, 1) for part in (grouped, new_logits, layer.new_values)]  # (B·H, …)
    first = 0
    for run_keys, run_values in layer.runs():
        at_once = max(1, LOGITS_AT_ONCE // (grouped.shape[2] * (run_keys.shape[1] + n_new)))
        for keys, values in zip(run_keys.split(at_once), run_values.split(at_once), strict=True):
            queries, logits_of_new, new_values = (part[first : first + len(keys)] for part in by_head)
            first += len(keys)
            logits = torch.cat(((queries @ keys.mT).float(), logits_of_new), dim=-1)
            weights = logits.softmax(dim=-1).to(query.dtype)
            n_kept = keys.shape[1]
            outputs.append(torch.baddbmm(weights[..., n_kept:] @ new_values, weights[..., :n_kept], values))
    return torch.cat(outputs).view(n_batch, num_heads, q_len, head_dim).transpose(1, 2)
