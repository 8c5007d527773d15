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


@dataclass(frozen=True)
class PackedTiling:
    """
    The same for a layer whose pairs are in tiers. The tiles of a head have neighbouring places, whatever their tier.

    Attributes
    ----------
    tiles : list of Tensor, shape (n_tiles, 4), int32
        For each tier and tile: the head, its first pair in the tier, the pair after its last, and the tile's place.
    first_tiles : Tensor, shape (B·H + 1,), int32
        Place of each head's first tile. The last entry is the number of all tiles.
    """

    tiles: list[Tensor]
    first_tiles: Tensor

    @classmethod
    def of(cls, lengths: list[list[list[int]]], tile_size: int, device: torch.device) -> PackedTiling:
        """Cut heads with these numbers of pairs, (tiers, B, H), into tiles of at most ``tile_size`` pairs."""
        tiles: list[list[tuple[int, int, int, int]]] = [[] for _ in lengths]
        first_tiles, ends = [0], [0] * len(lengths)
        for head, of_head in enumerate(zip(*(chain.from_iterable(of_tier) for of_tier in lengths), strict=True)):
            place = first_tiles[-1]
            for tier, length in enumerate(of_head):
                start, ends[tier] = ends[tier], ends[tier] + length
                for first in range(start, ends[tier], tile_size):
                    tiles[tier].append((head, first, min(first + tile_size, ends[tier]), place))
                    place += 1
            first_tiles.append(place)
        tables = [torch.tensor(of_tier, dtype=torch.int32).view(-1, 4).to(device) for of_tier in tiles]
        return cls(tables, torch.tensor(first_tiles, dtype=torch.int32).to(device))
