"""Counts by expert what an eviction cost: the attention that real queries paid to evicted and to kept tokens."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

# B = batch, H = KV heads, S = cached tokens, E = experts; h is H, or 1 if all heads have the same routing


def pairs_by_expert(pairs: Bool[Tensor, "B H S"], routed: Bool[Tensor, "B h S E"]) -> Float[Tensor, " E"]:
    """Number of marked pairs among the pairs routed to each expert."""
    return mass_by_expert(pairs.float(), routed)


def mass_by_expert(mass: Float[Tensor, "B H S"], routed: Bool[Tensor, "B h S E"]) -> Float[Tensor, " E"]:
    """
    Attention mass that falls on the tokens routed to each expert.

    A token routed to two experts counts for both. So the masses can sum to more than the whole.
    """
    if routed.shape[1] == 1:  # heads have the same routing: sum over them first
        return (mass.sum(1)[:, None] @ routed[:, 0].to(mass.dtype)).sum((0, 1))  # (B, 1, S) @ (B, S, E)
    return (mass[:, :, None] @ routed.to(mass.dtype)).sum((0, 1, 2))  # (B, H, 1, S) @ (B, H, S, E)
