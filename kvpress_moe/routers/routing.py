"""Routing: which experts judge which pair in one call of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kvpress_moe.routers.base import BaseMoERouter


@dataclass(frozen=True, eq=False)
class Routing:
    """
    What the press's ``route`` decides for one call of a layer. Every later stage reads it, and no stage changes it.

    Attributes
    ----------
    router : BaseMoERouter
        The layer's router.
    weights : Tensor, shape (B, 1 or H, S, E)
        Routing weights of the cached pairs, summing to 1 over E. They differ between heads only if a cache is
        compressed again.
    active : tuple of int
        Experts with a weight above zero somewhere. Other experts do not contribute to the score.
    """

    router: BaseMoERouter
    weights: Tensor
    active: tuple[int, ...]

    @cached_property
    def routed(self) -> Tensor:
        """Which expert judges which pair: bool, with the shape of ``weights``."""
        return self.weights > 0
