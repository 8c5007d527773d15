"""Loss curve: what a prompt's pairs lose together, at every budget of bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvpress_moe.budget.switch_prices import switch_prices

SAMPLED = 2**15  # pairs that are looked at


@dataclass(frozen=True)
class LossCurve:
    """
    Bytes and lost costs of a prompt's pairs while the price of a byte falls.

    Attributes
    ----------
    nbytes : Tensor, shape (P,), float64
        Bytes of all pairs, rising. The first entry is 0: every pair is evicted.
    lost : Tensor, shape (P,), float64
        Sum of what the chosen strategies cost, falling.
    """

    nbytes: Tensor
    lost: Tensor

    @classmethod
    def of(cls, costs: Tensor, nbytes: Int[Tensor, " M"]) -> LossCurve:
        """
        The curve of pairs whose strategies are chosen as by :func:`kvpress_moe.budget.byte_allocation.allocate_bytes`.

        Parameters
        ----------
        costs : Tensor, shape (M, ...)
            Cost of each strategy for each pair. The first strategy evicts.
        nbytes : Tensor, shape (M,)
            Bytes of a pair with each strategy, in rising order.

        Notes
        -----
        If there are more than ``SAMPLED`` pairs, only every n-th one is looked at, and stands for n pairs.
        """
        costs = costs.flatten(1)
        step = -(-costs.shape[1] // SAMPLED)
        sample = costs[:, ::step].float()
        scale = costs.shape[1] / sample.shape[1]
        prices = switch_prices(sample, nbytes.to(costs.device))  # (M - 1, N)
        more = nbytes.diff().double().to(costs.device)[:, None].expand_as(prices)
        less = sample.double().diff(dim=0)
        order = prices.flatten().argsort(descending=True, stable=True)
        used = order[prices.flatten()[order] > 0]  # a price of 0 or less: the strategy is never chosen
        zero = sample.new_zeros(1, dtype=torch.float64)
        spent = torch.cat((zero, more.flatten()[used].cumsum(0)))
        gained = torch.cat((zero, less.flatten()[used].cumsum(0)))
        lost = (sample[0].double().sum() + gained).clamp(min=0).cummin(0).values
        return cls(scale * spent, scale * lost)

    def at(self, nbytes: Tensor) -> Tensor:
        """What is lost with these bytes (K,), float64. Beyond the dearest choice of all pairs no more is gained."""
        index = torch.searchsorted(self.nbytes, nbytes.double().to(self.nbytes.device), right=True) - 1
        return self.lost[index.clamp(min=0)]
