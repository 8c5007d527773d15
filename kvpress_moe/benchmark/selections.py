"""Selections: what methods keep of one prompt's cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache

from kvpress_moe.benchmark.byte_strategies import Coded, LossTaker

Cell = tuple[str, float]  # method, compression ratio


@dataclass
class Kept:
    """
    What a method left of one prompt's cache.

    Attributes
    ----------
    mask : list of Tensor, each (H, S), bool
        For each layer with full attention: the pairs that stayed.
    altered : list of (keys, values), each a list of H tensors (K, D), or None
        For each layer with full attention, and each head: the pairs themselves, if a press changed them (merged values,
        rotated keys).
    next_position : int
        Position of the next token; smaller than S if keys were rotated to new positions.
    seconds : float
        Time that scoring and selecting took.
    coded : Coded or None
        Strategies of the pairs, if they are coded.
    n_bytes : int or None
        Bytes in a 16-bit cache, if they do not follow from the number of pairs.
    """

    mask: list[Tensor]
    altered: list[tuple[list[Tensor], list[Tensor]]] | None = None
    next_position: int = 0
    seconds: float = 0.0
    coded: Coded | None = None
    n_bytes: int | None = None

    @property
    def n_pairs(self) -> int:
        """Number of pairs that stayed."""
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
        The full cache, batch 1.
    layers : list of int
        Layers with full attention. Presses compress only these; the caches of the other layers are bounded anyway.
    kept : dict of (method, ratio) -> Kept
    losses : LossTaker or None
        What each strategy loses of the pairs, if a method needs it whose weights come from another pass.
    prefill_seconds : float
        Duration of the shared prefill, without the time that presses took.
    """

    cache: DynamicCache
    layers: list[int]
    kept: dict[Cell, Kept] = field(default_factory=dict)
    losses: LossTaker | None = None
    prefill_seconds: float = 0.0
