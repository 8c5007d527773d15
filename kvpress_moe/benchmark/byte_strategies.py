"""Byte strategies: how methods of the benchmark code the pairs that they keep, and under which byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress_moe.budget.shared_bytes import decide_strategies, strategy_costs
from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.cache.tier import TABLE_BYTES
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.precision import Precision
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.model.attention import per_kv_head
from kvpress_moe.model.layers import Attention
from kvpress_moe.press.packing import Menu, cost_of_strategies, key_basis, losses_of_strategies, positions_of

if TYPE_CHECKING:
    from kvpress_moe.benchmark.methods import Method

LEAST_WEIGHT = 1e-9  # of a pair, so that its logarithm is finite
ELEMENT_SIZE = 2  # all bytes are shares of a 16-bit cache, whatever type the model has here


@dataclass
class Coded:
    """
    The strategies of all pairs of one prompt.

    Attributes
    ----------
    strategies : list of Tensor, each (H, S), uint8
        For each layer with full attention. 0: evicted; m: stored with the m-th precision of the menu.
    menu : Menu
    bases : list of KeyBasis or None
        For each layer.
    """

    strategies: list[Tensor]
    menu: Menu
    bases: list[KeyBasis | None]

    @property
    def n_bytes(self) -> int:
        """Bytes in a 16-bit cache: codes with their scales, and the tables of lengths."""
        tables = TABLE_BYTES * len(self.menu.precisions) * sum(len(layer) for layer in self.strategies)
        return tables + sum(int(self.menu.nbytes[layer.long().cpu()].sum()) for layer in self.strategies)


def decode_all(coded: Sequence[Coded], number: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """
    A layer's keys and values (H, S, D) after coding and decoding, for several caches of one prompt.

    Every pair is coded once with each precision that any cache with the same menu uses for it, however many caches
    there are. Evicted pairs have arbitrary keys and values.
    """
    found = [(torch.empty_like(keys[0]), torch.empty_like(values[0])) for _ in coded]
    menus: dict[tuple[Any, ...], list[int]] = {}
    for index, one in enumerate(coded):
        menus.setdefault((one.menu.precisions, id(one.bases[number])), []).append(index)
    for (precisions, _), members in menus.items():
        chosen = torch.stack([coded[index].strategies[number] for index in members])  # (N, H, S)
        for strategy in range(1, len(precisions) + 1):
            wanted = chosen == strategy
            used = wanted.any(0)
            if not used.any():
                continue
            basis = coded[members[0]].bases[number]
            packed = PackedLayer.from_strategies(keys, values, used[None] * strategy, precisions, basis)
            for part, heads in enumerate(zip(*packed.heads()[0], strict=True)):
                with_precision = torch.zeros_like(keys[0])
                with_precision[used] = torch.cat(heads)
                for index, mask in zip(members, wanted, strict=True):
                    found[index][part][mask] = with_precision[mask]
    return found


def _basis_and_menu(press: Any, call: LayerCall, positions: Tensor) -> tuple[KeyBasis | None, Menu]:
    """The basis of a layer's keys, and the menu of a press in a 16-bit cache."""
    basis = key_basis(call, call.layer_idx, press.routers, positions)
    return basis, Menu.of(press.menu, call.keys.shape[-1], ELEMENT_SIZE, basis)


class CostTaker:
    """
    What each strategy costs for the pairs of a prompt, layer by layer.

    Parameters
    ----------
    press : ScorerPress
        A MoERouterPress, whose own rule is used; or a scorer that RDKV's rule is used with.
    method : Method
    sinks, recent : int
        Number of first and of last tokens that are never evicted.
    """

    def __init__(self, press: Any, method: Method, sinks: int, recent: int):
        self.press, self.method = press, method
        self._protected = (sinks, recent)
        self.costs: list[Tensor] = []
        self.bases: list[KeyBasis | None] = []
        self.menu: Menu | None = None
        self.seconds = 0.0

    def add_layer(self, module: Attention, arguments: tuple[Any, ...], clock: Any) -> None:
        start = clock.now()
        call = LayerCall(module, *arguments)
        positions = positions_of(call, None)
        if self.method.precision == "rdkv":
            basis, menu = None, Menu.of(RDKV_MENU, call.keys.shape[-1], ELEMENT_SIZE, None)
            costs = rdkv_costs(call, menu)
        else:
            routing = self.press.route(call)
            scores = self.press.mix(call, routing)
            basis, menu = _basis_and_menu(self.press, call, positions)
            costs = cost_of_strategies(call, routing, scores, menu, basis, positions)
        sinks, recent = self._protected
        costs[0, ..., :sinks] = torch.inf
        costs[0, ..., max(0, costs.shape[-1] - recent) :] = torch.inf
        self.menu = menu
        self.costs.append(costs)
        self.bases.append(basis)
        self.seconds += clock.now() - start

    def result(self, ratio: float, min_share: float) -> Coded:
        """The strategies if the share ``ratio`` of the bytes of a 16-bit cache is removed."""
        assert self.menu is not None
        own = self.method.precision == "own"  # such a press knows its scope once it has seen the model
        budget = self.press.scope if own else str(self.method.budget)
        return by_cost(self.costs, ratio, self.menu, self.bases, budget, min_share)


class LossTaker:
    """
    What each strategy loses of the pairs of a prompt, layer by layer. Weights of pairs come later, from another pass.

    Parameters
    ----------
    press : MoERouterPress
        Its menu and the key transforms of its routers are used.
    """

    def __init__(self, press: Any):
        self.press = press
        self.losses: list[Tensor] = []
        self.bases: list[KeyBasis | None] = []
        self.menu: Menu | None = None
        self.seconds = 0.0

    def add_layer(self, module: Attention, arguments: tuple[Any, ...], clock: Any) -> None:
        start = clock.now()
        call = LayerCall(module, *arguments)
        positions = positions_of(call, None)
        basis, self.menu = _basis_and_menu(self.press, call, positions)
        self.losses.append(losses_of_strategies(call, self.menu, basis, positions))
        self.bases.append(basis)
        self.seconds += clock.now() - start

    def costs(self, weights: Sequence[Tensor], sinks: int, recent: int) -> list[Tensor]:
        """
        Costs (M, 1, H, S) of each layer by the rule with constants, from what it costs to evict each pair (H, S).

        The first and the last tokens are never evicted.
        """
        found = []
        for weight, losses in zip(weights, self.losses, strict=True):
            costs = strategy_costs(weight[None].clamp(min=LEAST_WEIGHT).log(), losses)
            costs[0, ..., :sinks] = torch.inf
            costs[0, ..., max(0, costs.shape[-1] - recent) :] = torch.inf
            found.append(costs)
        return found


#: RDKV's numbers of bits, for keys and values alike.
RDKV_MENU = tuple(Precision(bits, bits) for bits in (2, 4, 8, 16))


def rdkv_costs(call: LayerCall, menu: Menu) -> Tensor:
    """
    Costs in the manner of RDKV (arXiv 2605.08317): one rate-distortion problem for eviction and quantisation.

    This is an implementation of our own, with this package's codes. The authors' code (github.com/Junkai1860/RDKV)
    differs in three things: bits of keys belong to channels instead of tokens, the attention is averaged over 5
    neighbouring tokens, and the loss of each number of bits is calibrated by layer.

    A pair weighs what its distortion does to the attention's output: the attention that the latest queries pay, times
    the squared norm of its value. Of the attention the square root is taken: of the powers 2, 1 and 0.5 it was the best
    on five samples of the tune split. A bit halves the error, so b bits leave ``4 ** -b`` of the squared error. The
    price of a byte then gives the bits of reverse water-filling, rounded to 0, 2, 4, 8 or 16.

    Returns
    -------
    Tensor, shape (M, B, H, S), bfloat16
    """
    mass = per_kv_head(call.window_mass, call.keys.shape[1])
    weights = mass.sqrt() * call.values.float().square().sum(-1)
    costs = [weights, *(weights * 4.0**-precision.key_bits for precision in menu.precisions)]
    return torch.stack(costs).to(torch.bfloat16)


def pairs_that_fit(n_pairs: int, ratio: float, precision: Precision, head_dim: int) -> int:
    """How many of a head's pairs stay at one precision, so that the share ``ratio`` of its 16-bit bytes is removed."""
    menu = Menu.of([precision], head_dim, ELEMENT_SIZE, None)
    return max(1, min(n_pairs, menu.budget(n_pairs, 1 - ratio) // int(menu.nbytes[1])))


def at_one_precision(masks: Sequence[Tensor], precision: Precision, head_dim: int) -> Coded:
    """All kept pairs (H, S) of each layer at one precision."""
    menu = Menu.of([precision], head_dim, ELEMENT_SIZE, None)
    return Coded([mask.to(torch.uint8) for mask in masks], menu, [None] * len(masks))


def by_cost(
    costs: Sequence[Tensor],
    ratio: float,
    menu: Menu,
    bases: Sequence[KeyBasis | None],
    budget: str,
    min_share: float,
) -> Coded:
    """
    Strategies with the lowest costs under a byte budget.

    Parameters
    ----------
    costs : sequence of Tensor, each (M, 1, H, S)
        For each layer.
    ratio : float
        Share of the bytes of a 16-bit cache to remove.
    menu : Menu
    bases : sequence of KeyBasis or None
    budget : {"uniform", "layer", "global"}
    min_share : float
    """
    n_pairs = costs[0].shape[-1]
    allowed = menu.plan(n_pairs, 1 - ratio, 1 if budget == "uniform" else min_share * (1 - ratio) * n_pairs)
    groups = [torch.cat(list(costs), dim=2)] if budget == "global" else list(costs)
    chosen = [decide_strategies(group.clone(), menu.nbytes, allowed, budget == "uniform")[0] for group in groups]
    strategies = list(torch.cat(chosen).split([layer.shape[2] for layer in costs]))
    return Coded(strategies, menu, list(bases))
