"""RecordingPress: a MoERouterPress that also records weights, scores and kept pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.budget.switch_prices import switch_prices
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import mix_near, rank_within_head
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.packing import Menu, PackedPart
from kvpress_moe.routers import Routing


@dataclass
class LayerRecord:
    """
    Weights, scores and kept pairs of one layer, for one prompt (batch 1), on the CPU.

    Attributes
    ----------
    weights : Tensor, shape (S, E), float32
        Routing weights of each token, summing to 1.
    scores : Tensor, shape (H, S), float32
        Mixed score of each pair; higher = keep.
    moves : Tensor, shape (H, E, S), float32
        What each expert adds to a pair's score, minus the mean of this over the head's pairs. The sum over all experts
        is the pair's score minus the head's mean score. What scores lose with distance does not count here.
    mass : Tensor, shape (H, S), float32
        Attention that the prompt's last queries pay to each pair, as in the hit rates.
    kept : Tensor, shape (H, S), bool
        The pairs that stayed.
    strategies : Strategies or None
        With a precision: which strategy each pair got, and which it would get with other budgets.
    """

    weights: Tensor
    scores: Tensor
    moves: Tensor
    mass: Tensor | None = None
    kept: Tensor | None = None
    strategies: Strategies | None = None


@dataclass
class Strategies:
    """
    The strategies of one layer's pairs.

    Attributes
    ----------
    menu : Menu
    chosen : Tensor, shape (H, S), uint8
        0: evicted; m: stored with the m-th precision of the menu.
    prices : Tensor, shape (M, H, S), float32
        See :func:`kvpress_moe.budget.switch_prices.switch_prices`; M precisions.
    """

    menu: Menu
    chosen: Tensor
    prices: Tensor


class RememberingExpert(Expert):
    """An expert that computes the scores of a call only once, and then returns them again."""

    def __init__(self, expert: Expert):
        super().__init__(expert.name, expert.scorer, expert.keep, expert.registered)
        self._expert = expert
        self._last: tuple[Tensor, Tensor] | None = None  # keys and their scores

    def score(
        self,
        call: LayerCall,
        compression_ratio: float | None,
        routing: Routing | None = None,
        ranks: Tensor | None = None,
    ) -> Tensor:
        if self._last is None or self._last[0] is not call.keys:
            self._last = (call.keys, self._expert.score(call, compression_ratio, routing, ranks))
        return self._last[1]


class RecordingPress(MoERouterPress):
    """
    Compresses exactly as :class:`~kvpress_moe.MoERouterPress` with the same settings, and keeps a record of each layer.

    Attributes
    ----------
    records : dict of int -> LayerRecord
        Layer index -> record of the latest prompt, whose batch must be 1. Layers that are not compressed have none.
    """

    def __post_init__(self) -> None:
        self.records: dict[int, LayerRecord] = {}
        super().__post_init__()

    def bound_to_ratio(self) -> list[str]:
        """Names of the experts whose scores depend on the ratio."""
        return [expert.name for expert in self._experts if expert.reads_ratio]

    def _make_experts(self, specs: Sequence[Any]) -> list[Expert]:
        return [RememberingExpert(expert) for expert in super()._make_experts(specs)]

    @torch.no_grad()
    def mix(self, call: LayerCall, routing: Routing) -> Tensor:
        scores = super().mix(call, routing)
        self.records[call.layer_idx] = LayerRecord(
            weights=routing.weights[0].mean(0).float().cpu(),
            scores=scores[0].float().cpu(),
            moves=torch.stack([self._move(call, routing, index) for index in range(self.num_experts)], dim=1),
        )
        return scores

    def _move(self, call: LayerCall, routing: Routing, index: int) -> Tensor:
        """What one expert adds to the pairs' scores (H, S), minus its mean over the head."""
        if index not in routing.active:
            return torch.zeros(call.keys.shape[1:3])
        if routing.router.calibration is None and len(routing.active) > 1:  # ranks are mixed, except if one is alone
            part = rank_within_head(self._experts[index].score(call, self.compression_ratio, routing))
            part = part * routing.weights[..., index]
        else:  # a sum: if the other weights are zero, this expert's term and the head's offset remain
            alone = torch.zeros_like(routing.weights)
            alone[..., index] = routing.weights[..., index]
            part = mix_near(call, replace(routing, weights=alone), self._experts, self.compression_ratio)
        part = part[0].double().cpu()
        move = (part - part.mean(-1, keepdim=True)).nan_to_num(nan=0)  # if scores are infinite
        largest = torch.finfo(torch.float32).max  # some scorers give it to pairs that must stay
        return move.clamp(-largest, largest).float()

    def record(self, layer_idx: int, observation: Observation, kept: Tensor) -> None:
        super().record(layer_idx, observation, kept)
        self.records[layer_idx].mass = observation.mass[0].float().cpu()
        self.records[layer_idx].kept = kept[0].cpu()

    def record_strategies(self, layer_idx: int, menu: Menu, part: PackedPart, element_size: int) -> None:
        super().record_strategies(layer_idx, menu, part, element_size)
        prices = switch_prices(part.costs[:, 0], menu.nbytes.to(part.costs.device)).cpu()
        self.records[layer_idx].strategies = Strategies(menu, part.strategies[0].cpu(), prices)
