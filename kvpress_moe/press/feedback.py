"""Feedback: counts routing and eviction, and tells the routers the hit rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kvpress.utils import extract_keys_and_values
from torch import Tensor

from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.budget.hit_rates import mass_by_expert, pairs_by_expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.model.attention import per_kv_head
from kvpress_moe.model.layers import Attention
from kvpress_moe.press.evicted_keys import EvictedKeys
from kvpress_moe.press.nan_checks import check_finite
from kvpress_moe.press.statistics import RoutingStats
from kvpress_moe.routers import RouterOutput, Routers, Routing

N_SINK = 4  # the first tokens; hit rates leave them out


@torch.no_grad()
def observe(call: LayerCall, routing: Routing) -> Observation:
    """
    The routing of a call, and the attention of its latest queries. :func:`count` needs both.

    The first four tokens are left out of the attention mass (if there are more than eight). They are attention sinks,
    and nearly every expert keeps them. The hit rates of the experts that judge them would depend on nothing else.
    """
    mass = per_kv_head(call.window_mass, call.keys.shape[1])
    if call.k_len > 2 * N_SINK:
        mass = mass.clone()
        mass[..., :N_SINK] = 0
    return Observation(routing.routed, mass)


@torch.no_grad()
def count(observation: Observation, kept: Tensor) -> dict[str, Tensor]:
    """
    Pairs and attention of each expert, each of shape (E,), if only the pairs ``kept`` (B, H, S) stay.

    Returns
    -------
    dict of str -> Tensor
        ``judged`` and ``kept``: pairs; ``mass`` and ``hit``: attention on all pairs and on those that stay.
    """
    routed, mass = observation.routed, observation.mass
    return {
        "judged": pairs_by_expert(torch.ones_like(kept), routed),
        "kept": pairs_by_expert(kept, routed),
        "mass": mass_by_expert(mass, routed),
        "hit": mass_by_expert(mass * kept, routed),
    }


def tell_router(routers: Routers | None, layer_idx: int, hit: Tensor, mass: Tensor) -> None:
    """Give a layer's router the experts' hit rates. 0 / 0 is NaN, which means unknown."""
    assert routers is not None, "tokens were routed, so there are routers"
    routers.layers[layer_idx].observe(hit / mass)


class Feedback:
    """
    The press's counts. With ``track_misses`` also the keys that it evicted.

    Attributes
    ----------
    stats : RoutingStats
    evicted : EvictedKeys
    """

    def __init__(self) -> None:
        self.stats = RoutingStats()
        self.evicted = EvictedKeys()

    def add_routing(self, layer_idx: int, output: RouterOutput) -> None:
        """Count what a router decided for a layer's tokens."""
        assigned = output.chosen.sum((0, 1))  # (E,)
        n_tokens = output.chosen[..., 0].numel()
        self.stats.add(
            layer_idx, calls=1, tokens=n_tokens, aux_loss=output.aux_loss, assigned=assigned, used=assigned > 0
        )

    def add_eviction(self, layer_idx: int, observation: Observation, kept: Tensor, routers: Routers | None) -> None:
        """Count what each expert's tokens lost if only the pairs ``kept`` (B, H, S) stay, and tell the router."""
        counts = count(observation, kept)
        self.stats.add(layer_idx, **counts)
        tell_router(routers, layer_idx, counts["hit"], counts["mass"])

    def add_decoding_step(self, module: Attention, kwargs: Mapping[str, Any], routers: Routers | None) -> None:
        """Count the attention of new tokens to kept and to evicted pairs, and tell the router."""
        keys, values = extract_keys_and_values(kwargs["past_key_values"], module.layer_idx)
        call = LayerCall(module, kwargs["hidden_states"], keys, values, None, kwargs)
        masses = self.evicted.masses(call)
        if masses is not None:
            hit, mass = masses
            check_finite(call, mass=mass)
            self.stats.add(call.layer_idx, hit=hit, mass=mass)
            tell_router(routers, call.layer_idx, hit, mass)

    def keep_evicted(self, call: LayerCall, routing: Routing, indices: Tensor) -> None:
        """Keep the keys of a call that are not at ``indices``, shape (B, H, K)."""
        self.evicted.keep(call, routing, indices)

    def forget_evicted(self) -> None:
        """Forget the evicted keys. The routing that was stored with them is no longer valid."""
        self.evicted = EvictedKeys()
