"""Finds keys again. A hash of each key's bits tells which of a layer's pairs a press returned."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# B = batch, H = KV heads, S = tokens of the prompt, K = keys to find, D = head dim

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_keys(keys: Float[Tensor, "B H S D"]) -> Int[Tensor, "B H S"]:
    """
    A 64-bit hash of the bits of each key. It does not depend on the order of summation.

    The keys of two tokens differ because of their rotary positions, so equal hashes mean the same pair.
    """
    bits = keys.contiguous().view(_BITS[keys.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (keys.shape[-1],), generator=generator).to(keys.device) * 2 + 1
    return (bits * odd).sum(-1)  # integers wrap around, so the sum has no rounding


class KeyIndex:
    """
    The keys of one layer, sorted by their hashes.

    Parameters
    ----------
    keys : Tensor, shape (B, H, S, D)
    """

    def __init__(self, keys: Float[Tensor, "B H S D"]):
        self._hashes, self._positions = hash_keys(keys).sort(dim=-1)  # (B, H, S)

    def find(self, wanted: Float[Tensor, "B H K D"]) -> Int[Tensor, "B H K"] | None:
        """Positions of the wanted keys among the keys of their head. None if any of them is not there."""
        hashes = hash_keys(wanted)
        found = torch.searchsorted(self._hashes, hashes.contiguous()).clamp(max=self._hashes.shape[-1] - 1)
        if not torch.equal(self._hashes.gather(-1, found), hashes):
            return None
        return self._positions.gather(-1, found)

    def repeats(self) -> Bool[Tensor, "B H"]:
        """Which heads hold the same key twice. The positions of such keys cannot be told apart."""
        return (self._hashes[..., 1:] == self._hashes[..., :-1]).any(-1)
