"""A byte budget with a gradient: with what probability each pair gets each strategy."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_HALVINGS = 40  # of the range of the price's logarithm
_LOWEST, _HIGHEST = -60.0, 60.0


def soft_strategies(
    log_costs: Float[Tensor, "M P"], nbytes: Int[Tensor, " M"], budget: int, temperature: float
) -> Float[Tensor, "M P"]:
    """
    A soft form of :func:`kvpress_moe.budget.byte_allocation.allocate_bytes`, for all pairs of a prompt.

    Strategy m has the logit ``-log(cost + price * nbytes) / T``. The price is found by bisection, so that the expected
    bytes meet the budget. As the temperature T falls, the choice becomes that of ``allocate_bytes``.

    The price has a gradient too: if one pair wants more bytes, the price rises for all others. It follows from the
    implicit function theorem.

    Parameters
    ----------
    log_costs : Tensor, shape (M, P)
        Logarithm of what each strategy costs each pair. Infinity forbids a strategy; one must be allowed. Minus
        infinity: it costs nothing.
    nbytes : Tensor, shape (M,), int64
        Bytes of a pair with each strategy. The first one evicts and has 0.
    budget : int
        Bytes of all pairs together.
    temperature : float
        Of the logits, nats.

    Returns
    -------
    Tensor, shape (M, P)
        Logarithms of probabilities.
    """
    log_bytes = nbytes.to(log_costs.dtype).log()[:, None]  # minus infinity for the first strategy

    def choose(costs: Tensor, log_price: Tensor | float) -> Tensor:
        free = torch.logaddexp(costs[1:], log_bytes[1:] + log_price)  # not of the first: its gradient would be NaN
        return (-torch.cat((costs[:1], free)) / temperature).log_softmax(0)

    def expected(log_probs: Tensor) -> Tensor:
        return (log_probs.exp() * nbytes[:, None]).sum()

    fixed = log_costs.detach()
    low, high = _LOWEST, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(expected(choose(fixed, middle))) > budget else (low, middle)
    with torch.enable_grad():
        price = torch.tensor(high, dtype=fixed.dtype, device=fixed.device, requires_grad=True)
        (slope,) = torch.autograd.grad(expected(choose(fixed, price)), price)
    price = price.detach()
    if slope < 0 and log_costs.requires_grad:  # one Newton step: it adds a gradient, its value is nearly 0
        spent = expected(choose(log_costs, price))
        price = price - (spent - spent.detach()) / slope
    return choose(log_costs, price)


def draw_share(lowest: float, highest: float, uniform: float) -> float:
    """A share between two bounds, evenly on a log scale, from a number between 0 and 1."""
    return math.exp(math.log(lowest) + uniform * math.log(highest / lowest))
