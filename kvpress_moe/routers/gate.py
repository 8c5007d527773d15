"""The gate: router logits decide which experts judge which token, and with what weight. No loop over tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# B = batch, S = tokens, E = experts


class Gate(NamedTuple):
    """
    The gate's decision for every token.

    Attributes
    ----------
    probs : Tensor, shape (B, S, E), float32
        Softmax of the logits over all experts.
    chosen : Tensor, shape (B, S, E), bool
        The experts that judge a token: ``top_k`` of them, or fewer if no other expert had room.
    weights : Tensor, shape (B, S, E), float32
        ``probs`` of the chosen experts, normalised to sum to 1; 0 for all others.
    """

    probs: Tensor
    chosen: Tensor
    weights: Tensor


def expert_capacity(n_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """
    Largest number of tokens of one sequence that one expert takes.

    It is ``ceil(capacity_factor * n_tokens * top_k / num_experts)``.
    """
    return math.ceil(capacity_factor * n_tokens * top_k / num_experts)


def preference_order(logits: Float[Tensor, "B S E"]) -> Int[Tensor, "B S E"]:
    """
    Each token's experts, from most to least preferred.

    Ties go to the experts in turn: among equal logits, token ``s`` prefers expert ``s % E``, then the next one. So if
    all logits are equal, as in an untrained router, all experts get the same number of tokens.
    """
    n_tokens, num_experts = logits.shape[1:]
    tokens = torch.arange(n_tokens, device=logits.device)
    rotation = (tokens[:, None] + torch.arange(num_experts, device=logits.device)) % num_experts  # (S, E)
    rotation = rotation.expand(logits.shape[0], -1, -1)
    best_first = logits.gather(-1, rotation).sort(dim=-1, descending=True, stable=True).indices
    return rotation.gather(-1, best_first)


def tie_order(n_tokens: int, device: torch.device | None = None) -> Int[Tensor, " S"]:
    """
    Order in which tokens with equal probabilities are served: Knuth's multiplicative hash of the position.

    If they were served by position, the whole end of a prompt would go to the second-best experts.
    """
    tokens = torch.arange(n_tokens, device=device)
    return ((tokens * 2654435769) % 2**32).argsort(stable=True)


def assign_experts(
    probs: Float[Tensor, "B S E"], order: Int[Tensor, "B S E"], top_k: int, capacity: int
) -> Bool[Tensor, "B S E"]:
    """
    Give every token its ``top_k`` most preferred experts. No expert takes more than ``capacity`` tokens.

    First choices are served before second choices, and so on. If more tokens choose an expert than it has room for, it
    takes those with the highest ``probs``. The others go to their next choice. With a ``capacity_factor`` of at least 1
    every token gets at least one expert. Each sequence of the batch has its own capacity, so the other sequences do not
    change its routing.

    Time grows with S log S · E, memory with S · E.
    """
    n_batch, n_tokens, num_experts = probs.shape
    first_choices = order[..., :top_k]
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, first_choices, True)
    if bool((chosen.sum(1) <= capacity).all()):  # no expert gets too many
        return chosen

    ties = tie_order(n_tokens, probs.device)
    probs, order = probs[:, ties], order[:, ties]  # a stable sort now breaks ties as tie_order says
    chosen = torch.zeros_like(chosen)
    room = torch.full((n_batch, num_experts), capacity, device=probs.device)
    wanted = torch.full((n_batch, n_tokens), top_k, device=probs.device)
    for choice in range(num_experts):
        expert = order[..., choice]  # (B, S)
        asks = wanted > 0
        sureness = probs.gather(-1, expert[..., None]).squeeze(-1).masked_fill(~asks, -1.0)
        surest_first = sureness.sort(dim=-1, descending=True, stable=True).indices
        request = torch.zeros_like(chosen, dtype=torch.int32).scatter_(-1, expert[..., None], asks[..., None].int())
        request = request.gather(1, surest_first[..., None].expand_as(request))  # (B, S, E), surest token first
        granted = request.bool() & (request.cumsum(1) <= room[:, None])
        room = room - granted.sum(1)
        granted = torch.zeros_like(granted).scatter_(1, surest_first[..., None].expand_as(granted), granted)
        chosen |= granted
        wanted = wanted - granted.sum(-1)
        if choice >= top_k - 1 and not bool(wanted.any()):
            break
    return torch.zeros_like(chosen).index_copy_(1, ties, chosen)


def gate(logits: Float[Tensor, "B S E"], top_k: int, capacity_factor: float) -> Gate:
    """
    Turn router logits into routing weights.

    Parameters
    ----------
    logits : Tensor, shape (B, S, E)
        The router's logit of every expert for every token.
    top_k : int
        Experts per token, 1 to E.
    capacity_factor : float
        At least 1; see :func:`expert_capacity`.

    Returns
    -------
    Gate
        Softmax over all experts, the chosen experts, and their normalised weights (Shazeer et al., arXiv 1701.06538;
        capacity as in GShard, arXiv 2006.16668).
    """
    n_tokens, num_experts = logits.shape[1:]
    logits = logits.float()
    probs = logits.softmax(dim=-1)
    if top_k == num_experts:  # every expert judges every token; a capacity_factor of at least 1 allows it
        return Gate(probs, torch.ones_like(probs, dtype=torch.bool), probs)
    capacity = expert_capacity(n_tokens, num_experts, top_k, capacity_factor)
    chosen = assign_experts(probs.detach(), preference_order(logits.detach()), top_k, capacity)
    # A softmax over the chosen logits equals the renormalised probabilities and cannot divide 0 by 0.
    weights = logits.masked_fill(~chosen, -torch.inf).softmax(dim=-1)
    return Gate(probs, chosen, weights)


def load_balance(probs: Float[Tensor, "B S E"], chosen: Bool[Tensor, "B S E"]) -> Float[Tensor, ""]:
    """
    Auxiliary loss ``sum_e mean_prob_e * usage_share_e``. It is 1/E at perfect balance and up to 1/top_k at collapse.

    ``usage_share_e`` is expert e's share of all assignments (the shares sum to 1). Only ``mean_prob_e`` has a gradient
    (Switch Transformer, arXiv 2101.03961, without its factor E).
    """
    usage = chosen.sum((0, 1)).to(probs.dtype)
    return (probs.mean((0, 1)) * (usage / usage.sum())).sum()
