"""RoutingMemory: the routing weights of tokens that are still in a cache. Needed if it is compressed again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.experts.layer_call import LayerCall


class RoutingMemory:
    """
    For each layer: the cache, and the weights (B, H, K, E) of the pairs left in it, in cache order.

    During decoding, kvpress passes hidden states of the newest tokens only. The weights that were remembered when the
    cache was last compressed cover its oldest tokens. The new routing covers its newest tokens. Tokens between them get
    the mean of the known weights. If a wrapper hides which tokens it passes, all tokens get the mean of the new
    weights.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}  # a weak reference to a cache cannot be copied

    def remember(self, call: LayerCall, weights: Tensor, indices: Tensor) -> None:
        """Remember the weights (B, 1 or H, S, E) of the pairs at ``indices``, shape (B, H, K)."""
        if call.cache is None:
            return
        weights = weights.expand(-1, indices.shape[1], -1, -1)
        kept = weights.gather(2, indices[..., None].expand(-1, -1, -1, weights.shape[-1]))
        self._entries[call.layer_idx] = (weakref.ref(call.cache), kept)

    def recall(self, call: LayerCall) -> Tensor | None:
        """Weights of the oldest pairs in this call's cache. None if they are not known."""
        cache, weights = self._entries.get(call.layer_idx, (None, None))
        if cache is None or cache() is not call.cache or weights is None:
            return None
        fits = weights.shape[:2] == call.keys.shape[:2] and weights.shape[2] <= call.k_len - call.q_len
        return weights.to(call.keys.device) if fits else None

    def align(self, call: LayerCall, fresh: Tensor) -> Tensor:
        """
        Routing weights (B, 1 or H, S, E) of all cached pairs, from the new weights (B, Q, E) of the given tokens.
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
