"""Switch prices: at which price of a byte a pair would take a dearer strategy."""

from __future__ import annotations

import torch
from torch import Tensor


def switch_prices(costs: Tensor, nbytes: Tensor) -> Tensor:
    """
    The highest price at which a pair takes strategy m or a dearer one, for all strategies but the first.

    With the rule of :func:`kvpress_moe.budget.byte_allocation.allocate_bytes`, these prices tell the strategies for
    every budget: at a given price, a pair's strategy is the number of its switch prices that are not lower.

    Parameters
    ----------
    costs : Tensor, shape (M, ...)
        Cost of each strategy. Infinity forbids a strategy; the last one must be allowed.
    nbytes : Tensor, shape (M,)
        Bytes of a pair with each strategy, in rising order.

    Returns
    -------
    Tensor, shape (M - 1, ...), float32
        They do not rise with m. Infinity: at every price. Zero or less: at no price.
    """
    costs, sizes = costs.float(), nbytes.float()
    found = costs.new_empty(len(costs) - 1, *costs.shape[1:])
    for strategy, prices in enumerate(found, start=1):
        best = torch.full_like(prices, -torch.inf)
        for dearer in range(strategy, len(costs)):
            worst = torch.full_like(prices, torch.inf)  # what beats every cheaper strategy
            for cheaper in range(strategy):
                gain = (costs[cheaper] - costs[dearer]) / (sizes[dearer] - sizes[cheaper])
                worst = torch.minimum(worst, gain.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
            best = torch.maximum(best, worst)
        prices.copy_(best)
    return found
