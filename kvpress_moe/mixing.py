"""Scores of several experts -> one score per KV pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# B = batch, H = KV heads, S = cached tokens, E = experts; h is H, or 1 where all heads share their weights


def rank_within_head(scores: Float[Tensor, "B H S"]) -> Float[Tensor, "B H S"]:
    """
    Replace scores by their mid-rank within the head, in (0, 1): the share of the head's pairs that score lower.

    Scorers' raw scales differ by forty orders of magnitude; ranks do not. Equal scores get equal ranks. NaN stays NaN.
    """
    n_scores = scores.shape[-1]
    ordered, order = scores.sort(dim=-1)
    places = torch.arange(n_scores, device=scores.device)
    starts = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)  # of runs of equal scores
    ends = F.pad(starts[..., 1:], (0, 1), value=True)
    first = torch.where(starts, places, 0).cummax(-1).values
    last = torch.where(ends, places, n_scores).flip(-1).cummin(-1).values.flip(-1)
    ranks = (first + last + 1).to(torch.float32) / (2 * n_scores)
    return torch.empty_like(ranks).scatter_(-1, order, ranks).masked_fill_(scores.isnan(), torch.nan)


def mix(
    score_expert: Callable[[int], Tensor], active: Sequence[int], weights: Float[Tensor, "B h S E"]
) -> Float[Tensor, "B H S"]:
    """
    Weighted mean over experts of their ranks.

    Parameters
    ----------
    score_expert : callable
        Expert index -> scores (B, H, S). Called once for every active expert, for no other.
    active : sequence of int
        Experts with a non-zero weight somewhere. One alone passes through untouched, bit for bit.
    weights : Tensor, shape (B, H or 1, S, E)
        Routing weights, summing to 1 over E.
    """
    if len(active) == 1:
        return score_expert(active[0])
    mixed = None
    for expert in active:  # one expert at a time: no tensor of shape (B, H, S, E) is ever made
        ranks = rank_within_head(score_expert(expert)) * weights[..., expert]
        mixed = ranks if mixed is None else mixed.add_(ranks)
    return cast(Tensor, mixed)


def mix_calibrated(
    term: Callable[[int], Float[Tensor, "B H S"]],
    active: Sequence[int],
    weights: Float[Tensor, "B h S E"],
    offset: Float[Tensor, " H"],
) -> Float[Tensor, "B H S"]:
    """
    Weighted sum over experts of calibrated terms: an estimate of log attention that compares across heads and layers.

    Where the weights are equal, it is the plain sum of the terms (each weight is multiplied by E): a static mixture is
    inside the class, and so is every expert alone.

    Parameters
    ----------
    term : callable
        Expert index -> its calibrated opinion (B, H, S). Called once for every active expert, for no other.
    active : sequence of int
        Experts with a non-zero weight somewhere.
    weights : Tensor, shape (B, H or 1, S, E)
        Routing weights, summing to 1 over E.
    offset : Tensor, shape (H,)
        Of each head.
    """
    num_experts = weights.shape[-1]
    mixed = offset[:, None]
    for expert in active:
        mixed = mixed + term(expert) * (num_experts * weights[..., expert])
    return mixed
