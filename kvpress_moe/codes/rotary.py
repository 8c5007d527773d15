"""Rotary: the angles by which a layer's rotary embedding turns keys, recovered from its cosines and sines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvpress_moe.codes.exact import lasting


@dataclass(frozen=True)
class Rotary:
    """
    A rotary embedding (arXiv 2104.09864) with fixed frequencies: at position p, plane f is turned by ``p * angles[f]``.

    The frequencies may be those of any scaling (linear, YaRN, Llama 3, LongRoPE) and of a part of the head dimension.
    Plane f consists of channels f and f + F; channels from 2F on are not turned.

    Attributes
    ----------
    angles : tuple of F floats
        Angle per position of each plane, in radians.
    """

    angles: tuple[float, ...]

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> Rotary:
        """
        From cosines and sines (2, 2F) of two neighbouring positions.

        The difference of the two angles is taken to lie between minus pi and pi.
        """
        half = cos.shape[-1] // 2
        turned = torch.atan2(sin[:, :half].double(), cos[:, :half].double())
        step = torch.remainder(turned[1] - turned[0] + torch.pi, 2 * torch.pi) - torch.pi
        return cls(tuple(step.tolist()))

    def table(self, n_positions: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions from 0 on, each (n_positions, F), float32. The latest four are remembered."""
        rounded = max(1024, 1 << (n_positions - 1).bit_length())  # so that caches of many lengths share a table
        cos, sin = _table(self.angles, rounded, str(device))
        return cos[:n_positions], sin[:n_positions]

    def turn(self, vectors: Tensor, positions: Tensor, n_positions: int) -> Tensor:
        """
        Turn vectors (..., D) to positions (...), which are below ``n_positions``. Both shapes are broadcast.

        Returns
        -------
        Tensor, shape (..., D), float32
        """
        half = len(self.angles)
        cos, sin = (part[positions] for part in self.table(n_positions, vectors.device))
        first, second, fixed = vectors.float().split((half, half, vectors.shape[-1] - 2 * half), dim=-1)
        fixed = fixed.expand(*torch.broadcast_shapes(fixed.shape[:-1], cos.shape[:-1]), fixed.shape[-1])
        return torch.cat((first * cos - second * sin, second * cos + first * sin, fixed), dim=-1)

    def products(self, queries: Tensor, vector: Tensor, n_positions: int) -> Tensor:
        """
        Products of queries (R, Q, D) with one vector (R, D) for each head, turned to all positions.

        No turned vector is made: the product is a sum of F cosines and F sines of the position.

        Returns
        -------
        Tensor, shape (R, Q, n_positions), float32
        """
        half = len(self.angles)
        cos, sin = self.table(n_positions, queries.device)
        sizes = (half, half, queries.shape[-1] - 2 * half)
        first, second, fixed = queries.float().split(sizes, dim=-1)
        v_first, v_second, v_fixed = vector.float()[:, None].split(sizes, dim=-1)
        product: Tensor = (first * v_first + second * v_second) @ cos.T
        product += (second * v_first - first * v_second) @ sin.T
        product += (fixed * v_fixed).sum(-1, keepdim=True)
        return product


@lru_cache(maxsize=4)
def _table(angles: tuple[float, ...], n_positions: int, device: str) -> tuple[Tensor, Tensor]:
    with lasting():
        per_position = torch.tensor(angles, dtype=torch.float64)
        turned = torch.arange(n_positions, dtype=torch.float64)[:, None] * per_position
        return turned.cos().float().to(device), turned.sin().float().to(device)
