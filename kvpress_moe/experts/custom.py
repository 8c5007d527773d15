"""A custom expert that returns the pairs it would keep -> a score."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpress_moe.errors import ExpertError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(keys: Float[Tensor, "B H S D"]) -> Int[Tensor, "B H S"]:
    """
    A 64-bit fingerprint of the bits of each key; exact, whatever the order of summation.

    Two tokens' keys differ by their rotary position, so equal fingerprints mean the same pair.
    """
    bits = keys.contiguous().view(_BITS[keys.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (keys.shape[-1],), generator=generator).to(keys.device) * 2 + 1
    return (bits * odd).sum(-1)  # wraps around, which is exact


def score_selection(
    kept_keys: Float[Tensor, "B H K D"], keys: Float[Tensor, "B H S D"], strategy: str
) -> Float[Tensor, "B H S"]:
    """
    1 for pairs of ``keys`` that occur in ``kept_keys``, 0 for the others.

    Raises
    ------
    ExpertError
        If ``kept_keys`` holds a key that was not given.
    """
    given, kept = fingerprints(keys), fingerprints(kept_keys)
    ordered, positions = given.sort(dim=-1)
    found = torch.searchsorted(ordered, kept.contiguous()).clamp(max=given.shape[-1] - 1)
    if not torch.equal(ordered.gather(-1, found), kept):
        raise ExpertError(
            f"_apply_expert_compression returned keys for {strategy!r} that it was not given. Return a selection of "
            "the given pairs, unchanged, or a score of shape (batch, KV heads, pairs)."
        )
    return torch.zeros(given.shape, device=keys.device).scatter_(-1, positions.gather(-1, found), 1.0)
