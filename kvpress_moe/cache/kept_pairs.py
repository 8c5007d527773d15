"""Which pairs a press kept: a compressed cache is compared with the full one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvpress_moe.cache.key_hash import KeyIndex
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.errors import UnsupportedInputError

# B = batch, H = KV heads, S = tokens of the prompt, D = head dim


def kept_pairs(full: Cache, compressed: Cache) -> dict[int, Tensor]:
    """
    Where in the prompt the pairs of a compressed cache were. Keys are compared bit by bit.

    Neither cache says which positions it holds. But eviction copies keys unchanged, and rotary embedding makes all keys
    of a head different.

    Parameters
    ----------
    full, compressed : Cache
        Caches of the same prompt, before tokens were generated. For example the attribute ``cache`` of
        :class:`kvpress_moe.cache.prefill.Prefill`, and what its method ``compress`` returns. Tokens that a ragged layer
        got later do no harm. Pairs that a press of kvpress only masks (AdaKVPress and others) are still in the cache
        and count as kept; see :meth:`kvpress_moe.cache.RaggedCache.from_masked`.

    Returns
    -------
    dict of int -> Tensor (B, H, S), bool
        By layer. Layers that the cache knows as sliding are left out, because no press compresses them.

    Raises
    ------
    UnsupportedInputError
        If the caches are not from the same prompt, if keys were changed (KeyRerotationPress), or if a head of the full
        cache holds the same key twice.
    """
    if len(full.layers) != len(compressed.layers):
        raise UnsupportedInputError(
            f"compressed: got {len(compressed.layers)} layers, expected the full cache's {len(full.layers)}. "
            "Compress a copy of this full cache."
        )
    kept = {}
    layers: list[Any] = full.layers
    for layer_idx, (before, after) in enumerate(zip(layers, compressed.layers, strict=True)):
        if isinstance(before, RaggedLayer):
            raise UnsupportedInputError(f"full: layer {layer_idx} is a RaggedLayer, expected a cache never compressed.")
        if not before.is_sliding:
            kept[layer_idx] = _kept_in_layer(before.keys, after, layer_idx)
    return kept


def _kept_in_layer(keys: Tensor, after: Any, layer_idx: int) -> Tensor:
    left: Any = [[pair[0] for pair in row] for row in after.heads()] if isinstance(after, RaggedLayer) else after.keys
    if (len(left), len(left[0])) != keys.shape[:2]:
        raise UnsupportedInputError(
            f"compressed: layer {layer_idx} has {len(left)} rows of {len(left[0])} heads, expected "
            f"{keys.shape[0]} of {keys.shape[1]}. Compress a copy of this full cache."
        )
    kept = torch.zeros(keys.shape[:3], dtype=torch.bool)
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            place = f"layer {layer_idx}, head {head}"
            index = KeyIndex(keys[row, head][None, None])
            if bool(index.repeats()):
                raise UnsupportedInputError(
                    f"full: {place} holds the same key twice, expected keys that tell positions apart, as rotary "
                    "embedding makes them."
                )
            positions = index.find(left[row][head].to(keys.device)[None, None])  # (1, 1, K)
            if positions is None:
                raise UnsupportedInputError(
                    f"compressed: {place} holds keys that the full cache does not, expected some of its keys, "
                    "unchanged and without generated tokens. Compress a copy of this full cache, by a press that does "
                    "not change keys."
                )
            kept[row, head, positions.flatten().cpu()] = True
    return kept
