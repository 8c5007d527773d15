"""Tiling: heads of different lengths are cut into tiles of equal work, for kernels with one tile per program."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """
    Where the tiles of a layer's kept pairs are.

    Attributes
    ----------
    tiles : Tensor, shape (n_tiles, 3), int32
        For each tile: the head (row · H + head), its first pair, and the pair after its last.
    first_tiles : Tensor, shape (B·H + 1,), int32
        Index of each head's first tile. The last entry is the number of all tiles.
    """

    tiles: Tensor
    first_tiles: Tensor

    @classmethod
    def of(cls, lengths: list[list[int]], tile_size: int, device: torch.device) -> Tiling:
        """Cut heads (B, H) with these numbers of pairs into tiles of at most ``tile_size`` pairs."""
        tiles, first_tiles, end = [], [0], 0
        for head, length in enumerate(chain.from_iterable(lengths)):
            start, end = end, end + length
            tiles += [(head, first, min(first + tile_size, end)) for first in range(start, end, tile_size)]
            first_tiles.append(len(tiles))
        table = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).to(device)
        return cls(table, torch.tensor(first_tiles, dtype=torch.int32).to(device))
