"""RoutingMemory: the routing weights of tokens that are still in a cache, for when it is compressed again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.experts.layer_call import LayerCall


class RoutingMemory:
    """
    Per layer: which cache it was, and the weights (B, H, K, E) of the pairs left in it, in cache order.

    While decoding, kvpress hands over hidden states of the newest tokens only. What was remembered when the cache was
    last compressed covers its oldest tokens, the fresh routing its newest; tokens between them, and all tokens of a
    host that hides which tokens it hands over, get the mean weights of those that are known.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}  # caches cannot travel

    def remember(self, call: LayerCall, weights: Tensor, indices: Tensor) -> None:
        """Keep the weights (B, 1 or H, S, E) of the pairs at ``indices``, shape (B, H, K)."""
        if call.cache is None:
            return
        weights = weights.expand(-1, indices.shape[1], -1, -1)
        kept = weights.gather(2, indices[..., None].expand(-1, -1, -1, weights.shape[-1]))
        self._entries[call.layer_idx] = (weakref.ref(call.cache), kept)

    def recall(self, call: LayerCall) -> Tensor | None:
        """Weights of the oldest pairs in this call's cache, None if it was not seen before."""
        cache, weights = self._entries.get(call.layer_idx, (None, None))
        if cache is None or cache() is not call.cache or weights is None:
            return None
        fits = weights.shape[:2] == call.keys.shape[:2] and weights.shape[2] <= call.k_len - call.q_len
        return weights.to(call.keys.device) if fits else None

    def align(self, call: LayerCall, fresh: Tensor) -> Tensor:
        """
        Routing weights of all cached pairs, shape (B, 1 or H, S, E), from those of the given tokens, (B, Q, E).
        """
        fresh = fresh[:, None]  # (B, 1, Q, E)
        if call.gathered or call.q_len > call.k_len:
            return fresh.mean(2, keepdim=True).expand(-1, -1, call.k_len, -1)
        if call.q_len == call.k_len:
            return fresh
        known = self.recall(call)
        if known is None:
            unknown = fresh.mean(2, keepdim=True).expand(-1, -1, call.k_len - call.q_len, -1)
            return torch.cat((unknown, fresh), dim=2)
        fresh = fresh.expand(-1, known.shape[1], -1, -1)
        seen = torch.cat((known, fresh), dim=2)
        gap = call.k_len - seen.shape[2]
        return torch.cat((known, seen.mean(2, keepdim=True).expand(-1, -1, gap, -1), fresh), dim=2)
