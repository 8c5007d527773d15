"""Tier: those pairs of a layer that are stored with the same precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from kvpress_moe.codes.precision import Precision
from kvpress_moe.codes.transform_codes import TransformCodes
from kvpress_moe.codes.vector_codes import VectorCodes
from kvpress_moe.codes.whole_vectors import WholeVectors

Vectors = VectorCodes | TransformCodes | WholeVectors
TABLE_BYTES = 4  # of a number in a table of lengths


@dataclass(frozen=True, eq=False)
class Tier:
    """
    The pairs of one precision, row by row and head by head.

    Attributes
    ----------
    precision : Precision
    keys : VectorCodes, TransformCodes or WholeVectors, N vectors
    values : VectorCodes or WholeVectors, N vectors
    lengths : list of lists of int
        Number of pairs of each head, (B, H). The sum is N.
    """

    precision: Precision
    keys: Vectors
    values: Vectors
    lengths: list[list[int]]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and positions, and of the table of lengths."""
        return self.keys.nbytes + self.values.nbytes + TABLE_BYTES * sum(map(len, self.lengths))

    def starts(self) -> list[int]:
        """Index of each head's first pair; the last entry is the number of all pairs."""
        return list(accumulate(chain.from_iterable(self.lengths), initial=0))

    def select(self, rows: Sequence[int]) -> Tier:
        """The same precision for these rows of the batch."""
        per_row = [sum(heads) for heads in self.lengths]
        lengths = [list(self.lengths[row]) for row in rows]

        def of_rows(vectors: Vectors) -> Vectors:
            along = vectors.pairs_along
            parts = {name: tensor.split(per_row, dim=along) for name, tensor in vectors.tensors.items()}
            return vectors.with_tensors({n: torch.cat([p[row] for row in rows], dim=along) for n, p in parts.items()})

        return Tier(self.precision, of_rows(self.keys), of_rows(self.values), lengths)

    def to(self, device: torch.device | str) -> Tier:
        """The same pairs on a device."""

        def moved(vectors: Vectors) -> Vectors:
            tensors = vectors.tensors.items()
            return vectors.with_tensors({name: tensor.to(device, non_blocking=True) for name, tensor in tensors})

        return Tier(self.precision, moved(self.keys), moved(self.values), self.lengths)


@dataclass(frozen=True)
class TierTable:
    """
    Where the pairs of all heads are.

    Attributes
    ----------
    starts : list of lists of int
        Of each tier, see :meth:`Tier.starts`.
    offsets : list of lists of int
        Of each tier, by head: number of the head's pairs in the tiers before.
    longest : int
        Number of pairs of the longest head.
    """

    starts: list[list[int]]
    offsets: list[list[int]]
    longest: int

    @classmethod
    def of(cls, tiers: Sequence[Tier]) -> TierTable:
        lengths = [list(chain.from_iterable(tier.lengths)) for tier in tiers]
        by_head = [list(accumulate(own, initial=0)) for own in zip(*lengths, strict=True)]
        offsets = [[own[number] for own in by_head] for number in range(len(tiers))]
        return cls([tier.starts() for tier in tiers], offsets, max(own[-1] for own in by_head))

    def of_heads(self, number: int, heads: slice) -> tuple[list[int], list[int]]:
        """Starts and offsets of some neighbouring heads in a tier; one start more, where the last head ends."""
        return self.starts[number][heads.start : heads.stop + 1], self.offsets[number][heads]
