"""Byte allocation: which strategy each pair gets, so that the sum of costs is small and the bytes stay in a budget."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

BLOCK = 2**16  # pairs that are looked at together; they stay in the processor's cache
_LOWEST, _HIGHEST = -100.0, 80.0  # natural logarithms of a price; float32 holds both
_SAMPLED = 16  # every 16th pair tells the price roughly
_ROUGH, _FINE = 24, 18  # halvings of the range of the price's logarithm
_NEAR = 0.05  # half of the range around the rough price


def allocate_bytes(costs: Tensor, nbytes: Int[Tensor, " M"], budget: Int[Tensor, " G"]) -> Int[Tensor, "G P"]:
    """
    Choose a strategy for each pair, under one budget for all pairs of a group.

    Each pair takes the strategy with the lowest ``cost + price * nbytes``. The price of a byte is the same for all
    pairs of a group. It is found by bisection, so that the bytes stay within the budget. Pairs that would change at a
    slightly lower price then take more bytes, in their order, while the budget lasts. This is the Lagrangian
    method of bit allocation (Shoham and Gersho, 1988).

    Parameters
    ----------
    costs : Tensor, shape (M, G, P), float32 or bfloat16
        Cost of each strategy for each pair. Infinity forbids a strategy; at least one must be finite.
    nbytes : Tensor, shape (M,), int64
        Bytes of a pair with each strategy, in rising order.
    budget : Tensor, shape (G,), int64
        Bytes of each group. If even the cheapest allowed strategies take more, these are chosen.

    Returns
    -------
    Tensor, shape (G, P), uint8
        Index of each pair's strategy. Bytes that are left in a group are less than the step of one pair.
    """
    low = torch.full(budget.shape, _LOWEST, dtype=torch.float64, device=costs.device)
    high = torch.full_like(low, _HIGHEST)
    sample = costs[..., ::_SAMPLED].contiguous() if costs.shape[-1] >= 100 * _SAMPLED else costs
    share = sample.shape[-1] / costs.shape[-1]
    low, high = _bisect(sample, nbytes, budget.double() * share, low, high, _ROUGH)
    if sample is not costs:
        low, high = low - _NEAR, high + _NEAR
        low = torch.where(_bytes_at(costs, nbytes, low) > budget, low, _LOWEST)
        high = torch.where(_bytes_at(costs, nbytes, high) > budget, _HIGHEST, high)
    while bool((high - low > 3 * _NEAR).any()):  # the sample told a group's price wrongly
        low, high = _bisect(costs, nbytes, budget, low, high, 1)
    chosen, dearer = _at(costs, nbytes, high), _at(costs, nbytes, low)
    # A pair that takes the same at both ends of the range takes it between them too. Only the others are bisected.
    differ = (chosen != dearer).any(0)
    # With many groups most columns differ in one of them. Then a copy would not pay.
    varies = differ if int(differ.sum()) <= len(differ) // 2 else slice(None)
    some = costs[..., varies]
    fixed = nbytes[chosen.long()].sum(1) - nbytes[chosen[:, varies].long()].sum(1)
    low, high = _bisect(some, nbytes, budget - fixed, low, high, _FINE)
    chosen[:, varies], dearer[:, varies] = _at(some, nbytes, high), _at(some, nbytes, low)
    # Bytes that a slightly lower price would add. By rounding, a pair may take less at a lower price; it stays.
    more = (nbytes[dearer.long()] - nbytes[chosen.long()]).clamp(min=0)
    left = budget - nbytes[chosen.long()].sum(1)
    fits = (more.cumsum(1) <= left[:, None]) & (more > 0)
    return torch.where(fits, dearer, chosen)


def _bisect(
    costs: Tensor, nbytes: Tensor, budget: Tensor, low: Tensor, high: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Halve the range between a price that is too low and one that is high enough, group by group."""
    for _ in range(rounds):
        middle = (low + high) / 2
        over = _bytes_at(costs, nbytes, middle) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return low, high


def _bytes_at(costs: Tensor, nbytes: Tensor, log_price: Tensor) -> Tensor:
    prices, sizes = _prices(nbytes, log_price), nbytes.float()
    total = torch.zeros(costs.shape[1], dtype=torch.float64, device=costs.device)
    for block in costs.split(max(1, BLOCK // costs.shape[1]), dim=2):
        block = block.float()
        lowest = block[0] + prices[0]
        bytes_of = torch.full_like(lowest, float(sizes[0]))
        for cost, price, size in zip(block[1:], prices[1:], sizes[1:], strict=True):
            now = cost + price
            bytes_of = torch.where(now < lowest, size, bytes_of)
            lowest = torch.minimum(lowest, now)
        total += bytes_of.sum(1, dtype=torch.float64)  # whole numbers, so the sum is exact
    return total


def _at(costs: Tensor, nbytes: Tensor, log_price: Tensor) -> Tensor:
    prices = _prices(nbytes, log_price)
    found = torch.zeros(costs.shape[1:], dtype=torch.uint8, device=costs.device)
    size = max(1, BLOCK // costs.shape[1])
    for block, chosen in zip(costs.split(size, dim=2), found.split(size, dim=1), strict=True):
        block = block.float()
        lowest = block[0] + prices[0]
        for number in range(1, len(block)):  # faster than argmin
            now = block[number] + prices[number]
            chosen.masked_fill_(now < lowest, number)
            lowest = torch.minimum(lowest, now)
    return found


def _prices(nbytes: Tensor, log_price: Tensor) -> Tensor:
    """Price of each strategy in each group, shape (M, G, 1)."""
    return nbytes.float()[:, None, None] * log_price.exp().float()[:, None]
