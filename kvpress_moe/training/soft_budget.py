"""A budget with a gradient: how clearly each pair stays or goes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.budget.allocation import least_pairs, share


def soft_share(
    scores: Float[Tensor, "U S"],
    protected: Float[Tensor, " S"] | Tensor,
    n_kept: int,
    min_share: float,
    temperature: float,
) -> Float[Tensor, "U S"]:
    """
    A soft form of :func:`kvpress_moe.budget.allocation.share`: the log of how far each pair stays.

    This is ``log sigmoid(margin / T)``, where T is the temperature.

    The margin of a pair is its score minus a threshold: the best score that is evicted. If a unit keeps pairs below
    that score because of its minimum, its threshold is its own lowest kept score. In the result, ``sigmoid`` is at
    least one half for pairs that stay and at most one half for pairs that go. As the temperature falls, it becomes the
    decision of ``share``.

    The threshold has a gradient too: it rises with the scores near it. The budget is shared, so a pair that gains a
    place takes it from another pair, and the gradient contains this. (The gradient uses one threshold for all units.
    For a unit that keeps only its minimum, it says whether more pairs would help.)

    Parameters
    ----------
    scores : Tensor, shape (U, S)
        Units are the heads of all layers.
    protected : Tensor, shape (S,), bool
        Tokens that always stay. Their scores get no gradient.
    n_kept : int
        Pairs that a unit keeps on average; must be more than the protected ones.
    min_share : float
        Every unit keeps at least this share of ``n_kept``.
    temperature : float
        In the scores' unit, nats.
    """
    hard = scores.detach().masked_fill(protected, torch.finfo(torch.float32).max / 4)
    kept = share(hard[None], n_kept, least_pairs(n_kept, min_share, min_pairs=0))[0]
    best_to_go = hard.masked_fill(kept, -torch.inf).amax()
    last_to_stay = hard.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)  # (U, 1)
    threshold = torch.minimum(best_to_go, last_to_stay)
    undecided = torch.sigmoid((hard - threshold) / temperature)
    undecided = undecided * (1 - undecided)
    pull = undecided / undecided.sum().clamp(min=torch.finfo(torch.float32).tiny)
    threshold = threshold + (pull * (scores - scores.detach())).sum()  # adds a gradient; its value is 0
    margin = torch.where(protected, hard - threshold.detach(), scores - threshold)
    return F.logsigmoid(margin / temperature)
