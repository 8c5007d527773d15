"""How many KV pairs stay, and how heads share a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvpress_moe.budget.eviction import best

MIN_PAIRS = 40  # pairs of a head


def mixed_keep_fraction(usage: Sequence[int], keep_fractions: Sequence[float]) -> float:
    """
    Share of the pairs that stays if the experts' own fractions decide: ``sum_e usage_share_e * keep_fraction_e``.

    Parameters
    ----------
    usage : sequence of E ints
        Tokens routed to each expert. Only their shares matter.
    keep_fractions : sequence of E floats
        Own keep fraction of each expert, in [0, 1].
    """
    return sum(count * keep for count, keep in zip(usage, keep_fractions, strict=True)) / sum(usage)


def pairs_kept(k_len: int, keep_fraction: float) -> int:
    """
    Number of pairs that stay of ``k_len`` at ``keep_fraction``: at least 1, at most all.

    The number is truncated as in :func:`kvpress.utils.compute_n_kept`, but here the fraction is kept, not removed.
    """
    return max(1, min(k_len, int(k_len * keep_fraction)))


def least_pairs(n_kept: int, min_share: float, min_pairs: int = MIN_PAIRS) -> int:
    """
    Number of pairs that a head keeps at least, if heads share a budget of ``n_kept`` pairs on average.

    It is ``int(n_kept * min_share)``. Where this is less than ``min_pairs``, it is twice as many, but not more than
    ``min_pairs`` and not more than ``n_kept``. It is always at least 1. The share is the safeguard of Ada-KV
    (arXiv 2407.11550).

    Parameters
    ----------
    n_kept : int
    min_share : float
        Between 0 and 1.
    min_pairs : int
        With 0 only the share counts.
    """
    return max(1, int(n_kept * min_share), min(min_pairs, int(2 * n_kept * min_share), n_kept))


def share(scores: Float[Tensor, "B U S"], n_kept: int, floor: int) -> Bool[Tensor, "B U S"]:
    """
    Let units (heads of one layer, or of all layers) compete for one budget.

    Parameters
    ----------
    scores : Tensor, shape (B, U, S)
        Scores that can be compared between units; higher = keep.
    n_kept : int
        Mean number of pairs that a unit keeps. Each row of the batch keeps exactly ``U * n_kept`` pairs.
    floor : int
        Every unit keeps at least its best ``floor`` pairs, whatever the other units score. At least 1, at most
        ``n_kept``; see :func:`least_pairs`.

    Returns
    -------
    Tensor, shape (B, U, S), bool
        The pairs that stay. Of equal scores, the first unit's come first, and then the earlier positions.
    """
    scores = scores.float().clamp(max=torch.finfo(torch.float32).max)  # infinity marks the floor
    scores.masked_fill_(best(scores, floor), torch.inf)
    return best(scores.flatten(1), scores.shape[1] * n_kept).view_as(scores)
