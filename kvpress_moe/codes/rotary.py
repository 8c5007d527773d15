"""Rotary: the angles by which a layer's rotary embedding turns keys, recovered from its cosines and sines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvpress_moe.codes.exact import lasting

STEP = 128  # positions of the fine table


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

    def at(self, positions: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines at positions (...), which are below ``n_positions``: (..., F) each, float32."""
        coarse_cos, coarse_sin = (part[positions // STEP] for part in self._coarse(n_positions, positions.device))
        fine_cos, fine_sin = (part[positions % STEP] for part in self._fine(positions.device))
        return coarse_cos * fine_cos - coarse_sin * fine_sin, coarse_sin * fine_cos + coarse_cos * fine_sin

    def _fine(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions below ``STEP``."""
        return _table(self.angles, STEP, 1, str(device))

    def _coarse(self, n_positions: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Those of multiples of ``STEP``. One table of all positions would be larger than many packed caches."""
        n_steps = -(-n_positions // STEP)
        rounded = max(8, 1 << (n_steps - 1).bit_length())  # so that caches of many lengths share a table
        cos, sin = _table(self.angles, rounded, STEP, str(device))
        return cos[:n_steps], sin[:n_steps]

    def turn(self, vectors: Tensor, positions: Tensor, n_positions: int) -> Tensor:
        """
        Turn vectors (..., D) to positions (...), which are below ``n_positions``. Both shapes are broadcast.

        Returns
        -------
        Tensor, shape (..., D), float32
        """
        half = len(self.angles)
        cos, sin = self.at(positions, n_positions)
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
        cos, sin = self._coarse(n_positions, queries.device)
        fine_cos, fine_sin = self._fine(queries.device)
        sizes = (half, half, queries.shape[-1] - 2 * half)
        first, second, fixed = queries.float().split(sizes, dim=-1)
        v_first, v_second, v_fixed = vector.float()[:, None].split(sizes, dim=-1)
        of_cos = (first * v_first + second * v_second)[..., None, :]  # (R, Q, 1, F)
        of_sin = (second * v_first - first * v_second)[..., None, :]
        by_step = (of_cos * cos + of_sin * sin) @ fine_cos.T + (of_sin * cos - of_cos * sin) @ fine_sin.T
        product: Tensor = by_step.flatten(2)[..., :n_positions].contiguous()  # (R, Q, steps, STEP) before
        product += (fixed * v_fixed).sum(-1, keepdim=True)
        return product


@lru_cache(maxsize=16)
def _table(angles: tuple[float, ...], n_rows: int, step: int, device: str) -> tuple[Tensor, Tensor]:
    with lasting():
        per_position = torch.tensor(angles, dtype=torch.float64)
        turned = torch.arange(n_rows, dtype=torch.float64)[:, None] * (step * per_position)
        return turned.cos().float().to(device), turned.sin().float().to(device)
