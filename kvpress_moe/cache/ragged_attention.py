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

    One head after the other, on views of the flat tensors: no padding and no copy of the kept pairs.

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
    rows = zip(layer.heads(), grouped.unbind(), new_logits.unbind(), layer.new_values.unbind(), strict=True)
    for pairs_of_heads, *parts in rows:
        heads = zip(pairs_of_heads, *(part.unbind() for part in parts), strict=True)
        for (keys, values), queries, logits_of_new, new_values in heads:
            logits = torch.cat(((queries @ keys.T).float(), logits_of_new), dim=-1)
            weights = logits.softmax(dim=-1).to(query.dtype)
            n_kept = keys.shape[0]
            outputs.append(torch.addmm(weights[:, n_kept:] @ new_values, weights[:, :n_kept], values))
    return torch.stack(outputs).view(n_batch, num_heads, q_len, head_dim).transpose(1, 2)
