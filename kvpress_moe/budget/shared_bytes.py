"""SharedBytes: collects what strategies cost in the layers of a prompt, until the byte budget can be decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress_moe.budget.byte_allocation import allocate_bytes
from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.budget.eviction import best

# M = strategies; the first one evicts. B = batch, H = KV heads, U = heads that decide together, S = tokens


#: The cost of a loss d for a pair with score s is ``(exp(s) * d) ** POWER``.
POWER = 0.85
HIGHEST = 80.0  # log weights are cut off here, so that no cost is infinite


class ByteBudget(NamedTuple):
    """
    What the heads of a prompt may take.

    Attributes
    ----------
    nbytes : int
        Bytes of a head, on average.
    floor : int
        Number of pairs that each head keeps at least: those whose eviction costs most.
    whole : int
        Number of first tokens whose pairs get the last strategy.
    """

    nbytes: int
    floor: int
    whole: int


def strategy_costs(log_weights: Tensor, losses: Tensor) -> Tensor:
    """
    What each strategy costs: the pair's weight times the share of it that is lost, to the power ``POWER``.

    Parameters
    ----------
    log_weights : Tensor, shape (B, H, S)
        Logarithm of what evicting a pair costs.
    losses : Tensor, shape (M - 1, B, H, S)
        Loss with each strategy but the first, see :meth:`kvpress_moe.codes.distortion.Distortion.total`.

    Returns
    -------
    Tensor, shape (M, B, H, S), bfloat16
    """
    weights = (POWER * log_weights.float().clamp(max=HIGHEST)).exp()
    costs = torch.empty(len(losses) + 1, *weights.shape, dtype=torch.bfloat16, device=weights.device)
    costs[0] = weights
    for cost, loss in zip(costs[1:], losses, strict=True):
        cost.copy_(weights * loss**POWER)
    return costs


def as_costs(log_costs: Tensor) -> Tensor:
    """Costs in bfloat16 from their logarithms. They are never infinite."""
    return log_costs.clamp(max=HIGHEST).exp().to(torch.bfloat16)


def decide_strategies(costs: Tensor, nbytes: Tensor, budget: ByteBudget, each_head: bool) -> Tensor:
    """
    The strategy of each pair.

    Parameters
    ----------
    costs : Tensor, shape (M, B, U, S)
        Infinity forbids a strategy. The last one must be allowed. More is forbidden here, in place.
    nbytes : Tensor, shape (M,), int64
    budget : ByteBudget
    each_head : bool
        Whether each head has its own budget. Otherwise all heads of a row share.

    Returns
    -------
    Tensor, shape (B, U, S), uint8
    """
    n_rows, n_units = costs.shape[1:3]
    costs[:-1, ..., : budget.whole] = torch.inf
    costs[0].masked_fill_(best(costs[0].float(), budget.floor), torch.inf)
    groups = costs.flatten(1, 2) if each_head else costs.flatten(2, 3)
    allowed = budget.nbytes if each_head else budget.nbytes * n_units
    budgets = torch.full((groups.shape[1],), allowed, device=costs.device)
    return allocate_bytes(groups, nbytes.to(costs.device), budgets).view(n_rows, n_units, -1)


class SharedBytes:
    """
    Collects the costs (M, B, H, S) of a prompt's layers, then decides for all of them at once.

    The costs of a layer come as a list: one tensor for the whole batch, or one tensor for each row of a padded batch.
    Rows never compete with each other.

    Attributes
    ----------
    notes : dict of int -> object
        What was noted for each waiting layer.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[Tensor, Observation]]] = {}
        self.notes: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_waiting": {}, "notes": {}}

    def clear(self) -> None:
        """Forget the layers of a prompt whose forward pass did not end."""
        self._waiting.clear()
        self.notes.clear()

    def add(self, layer_idx: int, parts: list[tuple[Tensor, Observation]], note: Any = None) -> None:
        """Let a layer wait. Each part of the batch has its costs, and what was observed. The note is only kept."""
        self._waiting[layer_idx] = parts
        self.notes[layer_idx] = note

    def decide(
        self, nbytes: Tensor, budget: Callable[[int, Tensor], ByteBudget], each_head: bool
    ) -> dict[int, list[tuple[Tensor, Tensor, Observation]]]:
        """
        The strategies (B, H, S) of the pairs in each waiting layer, with their costs (M, B, H, S), part by part.

        Parameters
        ----------
        nbytes : Tensor, shape (M,), int64
            Bytes of a pair with each strategy.
        budget : callable
            ``budget(part, costs)`` gives the budget of a part of the batch. ``costs`` (M, B, U, S) are those of all
            waiting layers; they must not be changed.
        each_head : bool
            Whether each head has its own budget.
        """
        decided: dict[int, list[tuple[Tensor, Tensor, Observation]]] = {layer_idx: [] for layer_idx in self._waiting}
        for number, layers in enumerate(zip(*self._waiting.values(), strict=True)):
            device = layers[0][0].device
            pooled = torch.cat([costs.to(device) for costs, _ in layers], dim=2)
            chosen = decide_strategies(pooled, nbytes, budget(number, pooled), each_head)
            split = chosen.split([costs.shape[2] for costs, _ in layers], dim=1)
            for parts, strategies, (costs, observation) in zip(decided.values(), split, layers, strict=True):
                parts.append((strategies.to(costs.device), costs, observation))
        self._waiting.clear()
        return decided
