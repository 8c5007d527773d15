"""Sight: what the routers know of a prompt when it has been read, before they decide what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from kvpress_moe.budget.loss_curve import LossCurve


@dataclass(frozen=True)
class Sight:
    """
    What the routers know of one prompt.

    Attributes
    ----------
    curve : LossCurve
        What the pairs of all layers lose together, over their bytes in a 16-bit cache.
    features : Tensor, shape (1 + U,), float64, on the CPU
        Logarithm of the number of tokens. Then for each KV head of the compressed layers: logarithm of what evicting a
        pair costs on average. It is high if a few pairs of the head matter much more than the others.
    full_bytes : float
        Bytes of all pairs in a 16-bit cache.
    """

    curve: LossCurve
    features: Tensor
    full_bytes: float

    @classmethod
    def of(cls, costs: Tensor, nbytes: Int[Tensor, " M"], whole: int) -> Self:
        """
        What is known of a prompt of one row.

        Parameters
        ----------
        costs : Tensor, shape (M, U, S)
            Of the pairs of all heads in the compressed layers. The first strategy evicts.
        nbytes : Tensor, shape (M,)
            Bytes of a pair with each strategy, in a 16-bit cache.
        whole : int
            Bytes of a pair as the model wrote it, in a 16-bit cache.
        """
        mean_costs = costs[0].float().mean(-1).double().clamp(min=torch.finfo(torch.float32).tiny).log().cpu()
        features = torch.cat((torch.tensor([float(costs.shape[-1])]).double().log(), mean_costs))
        return cls(LossCurve.of(costs, nbytes), features, float(costs[0].numel() * whole))

    def lost(self, shares: Tensor) -> Tensor:
        """What the pairs lose if these shares (K,) of the bytes stay: (K,), float64, on the CPU."""
        return self.curve.at(self.full_bytes * shares.double()).cpu()
