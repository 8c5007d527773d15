"""Eviction: which pairs stay, by scores and a budget; and the smaller keys and values."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# B = batch, H = KV heads, S = cached tokens, K = kept tokens, D = head dim


def best(scores: Float[Tensor, "*units S"], n_kept: int) -> Bool[Tensor, "*units S"]:
    """
    True at the ``n_kept`` best scores of each row. Of equal scores, those that come first.

    ``topk`` does not say which of equal scores it takes, and this differs between devices. So only its values are used.

    Parameters
    ----------
    scores : Tensor, shape (…, S)
        Scores without NaN.
    n_kept : int
        Number from 1 to S.
    """
    least = scores.topk(n_kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    mask, tied = scores > least, scores == least
    missing = n_kept - mask.sum(-1, keepdim=True)
    return mask.logical_or_(tied & (tied.cumsum(-1) <= missing))


def select(scores: Float[Tensor, "B H S"], n_kept: int) -> Int[Tensor, "B H K"]:
    """
    Indices of the :func:`best` pairs of each head, in their original order.

    kvpress leaves them in the order of their scores. Some presses read positions from the cache index. They break when
    such a cache is compressed again.
    """
    return best(scores, n_kept).nonzero()[:, -1].view(*scores.shape[:-1], n_kept)


def evict(states: Float[Tensor, "B H S D"], indices: Int[Tensor, "B H K"]) -> Float[Tensor, "B H K D"]:
    """Keep only the pairs at ``indices``, in new memory."""
    return states.gather(2, indices[..., None].expand(-1, -1, -1, states.shape[-1]))


def kept_mask(indices: Int[Tensor, "B H K"], k_len: int) -> Bool[Tensor, "B H S"]:
    """True at the pairs that stay."""
    mask = torch.zeros(*indices.shape[:2], k_len, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices, True)
