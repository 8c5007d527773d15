"""EvictedKeys: estimates how much attention generated tokens would have paid to evicted pairs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.budget.eviction import evict, kept_mask
from kvpress_moe.budget.hit_rates import mass_by_expert
from kvpress_moe.experts.layer_call import LayerCall, latest_queries
from kvpress_moe.model.attention import causal_logits, layer_logits, per_kv_head
from kvpress_moe.routers import Routing


class EvictedKeys:
    """
    Keeps the keys that were evicted from each layer in CPU memory, with the experts that judged them.

    The query of a generated token is compared with the cached keys and with the evicted keys. One softmax over both
    says which share of its attention to the prompt would have gone to evicted pairs in a full cache. This is an
    estimate, because a full cache would also have led to other hidden states.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[weakref.ref[Any], Tensor, Tensor, Tensor]] = {}

    def __copy__(self) -> EvictedKeys:
        copied = EvictedKeys()
        copied._layers = dict(self._layers)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": {}}  # a weak reference to a cache cannot be copied

    def keep(self, call: LayerCall, routing: Routing, indices: Tensor) -> None:
        """Keep the keys of a call that are not at ``indices``, shape (B, H, K)."""
        if call.cache is None:
            return
        evicted = (~kept_mask(indices, call.k_len)).nonzero()[:, 2].view(*indices.shape[:2], -1)  # (B, H, S - K)
        routed = routing.routed.to(call.keys.dtype).expand(-1, indices.shape[1], -1, -1)
        self._layers[call.layer_idx] = (
            weakref.ref(call.cache),
            evict(call.keys, evicted).cpu(),
            evict(routed, evicted).bool().cpu(),
            evict(routed, indices).bool(),
        )

    @torch.no_grad()
    def masses(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """
        Attention mass of the call's new tokens on prompt pairs, by expert.

        Parameters
        ----------
        call : LayerCall
            A decoding step: hidden states of the new tokens, and all cached keys.

        Returns
        -------
        hit, mass : Tensor, shape (E,)
            Mass on kept pairs, and mass on kept and evicted pairs. None if the prompt of this cache was not tracked.
        """
        found: tuple[Any, ...] = self._layers.get(call.layer_idx, (None, None, None, None))
        cache, missing, routed_missing, routed_kept = found
        if cache is None or cache() is not call.cache or missing.shape[:2] != call.keys.shape[:2]:
            return None
        queries = latest_queries(call, call.q_len)
        cached = causal_logits(call.module, queries, call.keys)
        gone = layer_logits(call.module, queries.to(missing.device), missing).to(cached.device)
        attention = torch.cat((cached, gone), dim=-1).softmax(dim=-1).mean(dim=-2)  # (B, num_heads, cached + gone)
        attention = per_kv_head(attention, call.keys.shape[1])
        hit = mass_by_expert(attention[..., : routed_kept.shape[2]].contiguous(), routed_kept)
        miss = mass_by_expert(attention[..., call.k_len :].contiguous(), routed_missing.to(attention.device))
        return hit, hit + miss
