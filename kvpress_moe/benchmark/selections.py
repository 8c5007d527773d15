"""What methods keep of one prompt's cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache

Cell = tuple[str, float]  # method, compression ratio


@dataclass
class Kept:
    """
    What a method left of one prompt's cache.

    Attributes
    ----------
    mask : list of Tensor, each (H, S), bool
        Per layer with full attention, the pairs that stayed.
    altered : list of (keys, values), each a list of H tensors (K, D), or None
        Per layer with full attention and head the pairs themselves, where a press changed them (merged values, turned
        keys).
    next_position : int
        Position of the next token; smaller than S where keys were turned to new positions.
    seconds : float
        Time that scoring and selecting took.
    """

    mask: list[Tensor]
    altered: list[tuple[list[Tensor], list[Tensor]]] | None = None
    next_position: int = 0
    seconds: float = 0.0

    @property
    def n_pairs(self) -> int:
        """Pairs that stayed, counted."""
        if self.altered is not None:
            return sum(len(head) for keys, _ in self.altered for head in keys)
        return int(sum(mask.sum() for mask in self.mask))


@dataclass
class Selections:
    """
    A prompt's full cache and what every method keeps of it.

    Attributes
    ----------
    cache : DynamicCache
        Full, batch 1.
    layers : list of int
        Those with full attention, the only ones that presses compress: the others' caches are bounded anyway.
    kept : dict of (method, ratio) -> Kept
    prefill_seconds : float
        Of the shared prefill, without the time that presses took.
    """

    cache: DynamicCache
    layers: list[int]
    kept: dict[Cell, Kept] = field(default_factory=dict)
    prefill_seconds: float = 0.0
