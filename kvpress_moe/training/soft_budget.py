"""A budget with a gradient: who stays, and how nearly everybody else did."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.budget.allocation import share


def soft_share(
    scores: Float[Tensor, "U S"],
    protected: Float[Tensor, " S"] | Tensor,
    n_kept: int,
    min_share: float,
    temperature: float,
) -> Float[Tensor, "U S"]:
    """
    Log of how far each pair stays under the budget of :func:`kvpress_moe.budget.allocation.share`: ``log sigmoid(margin / T)``.

    A pair's margin is its score minus the threshold that the budget leaves it: the best score that has to go, or, in a
    unit that the floor helps, its own last score that stays. Pairs that stay are above a half, pairs that go at or
    below it; as the temperature falls, this becomes :func:`share` itself. The threshold rises with the scores near it,
    since a budget is shared: what gains a place takes it from others, and the gradient says so. (The gradient knows one
    threshold for all; of a unit on the floor it says whether more than the floor would help.)

    Parameters
    ----------
    scores : Tensor, shape (U, S)
        Units are the heads of all layers.
    protected : Tensor, shape (S,), bool
        Tokens that stay whatever their scores; no gradient reaches those.
    n_kept : int
        Pairs that a unit keeps on average; more than are protected.
    min_share : float
    temperature : float
        In the scores' unit, nats.
    """
    hard = scores.detach().masked_fill(protected, torch.finfo(torch.float32).max / 4)
    kept = share(hard[None], n_kept, min_share)[0]
    best_to_go = hard.masked_fill(kept, -torch.inf).amax()
    last_to_stay = hard.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)  # (U, 1)
    threshold = torch.minimum(best_to_go, last_to_stay)
    undecided = torch.sigmoid((hard - threshold) / temperature)
    undecided = undecided * (1 - undecided)
    pull = undecided / undecided.sum().clamp(min=torch.finfo(torch.float32).tiny)
    threshold = threshold + (pull * (scores - scores.detach())).sum()  # adds a gradient and no amount
    margin = torch.where(protected, hard - threshold.detach(), scores - threshold)
    return F.logsigmoid(margin / temperature)
