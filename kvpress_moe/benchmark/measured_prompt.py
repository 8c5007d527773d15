"""MeasuredPrompt: one prefill, and the KL divergence of as many compressed caches as are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.benchmark.byte_strategies import ELEMENT_SIZE, by_cost
from kvpress_moe.benchmark.cache_eval import evaluate_caches, evaluate_full_cache
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.selections import Kept, Selections
from kvpress_moe.benchmark.shared_prefill import allocate
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.model.hooks import hooked, prepared
from kvpress_moe.model.layers import Attention, full_attention_layers, full_attentions
from kvpress_moe.model.transformers_api import attention_arguments, with_cache
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.packing import Menu, cost_of_strategies, key_basis, positions_of
from kvpress_moe.press.promised_budget import eviction_costs, pair_sizes
from kvpress_moe.routers.sight import Sight

Request = tuple[str, float]  # name of a press, share of the bytes (or of the pairs) that it keeps


class MeasuredPrompt:
    """
    A prompt that is prefilled once. Its cache can then be compressed by several presses, to any size.

    Presses act after a layer's attention, so their choices do not change what the next layers compute. All presses
    must have the same routers.

    Parameters
    ----------
    model : PreTrainedModel
    prompt : Prompt
    presses : dict of str -> MoERouterPress
        With and without a precision. They see the model as in a ``with`` block, but no hook of theirs is used.

    Attributes
    ----------
    sights : dict of str -> Sight
        What each press sees of the prompt before it decides.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompt: Prompt, presses: Mapping[str, MoERouterPress]):
        self.model, self.prompt, self.presses = model, prompt, presses
        self.cache = DynamicCache()
        self._scores: list[Tensor] = []
        self._costs: dict[str, list[Tensor]] = {name: [] for name in presses}
        self._bases: list[KeyBasis | None] = []
        self._menus: dict[str, Menu] = {}
        with prepared(model, presses.values()), hooked(full_attentions(model), self._see):
            model.model(input_ids=prompt.context.to(model.device), **with_cache(self.cache))
        self._layers = full_attention_layers(model)
        self._reference = evaluate_full_cache(model, self.cache, prompt)
        self.sights = {name: self._sight(name) for name in presses}

    def _see(self, module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        layer: Any = self.cache.layers[module.layer_idx]
        kwargs = attention_arguments(module, kwargs)
        call = LayerCall(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
        positions = positions_of(call, None)
        first = next(iter(self.presses.values()))
        routing = first.route(call)
        scores = first.mix(call, routing)
        basis = key_basis(call, call.layer_idx, first.routers, positions)
        for name, press in self.presses.items():
            if press.precision is None:
                costs = eviction_costs(routing.router, scores)
            else:
                menu = self._menus[name] = Menu.of(press.menu, call.keys.shape[-1], ELEMENT_SIZE, basis)
                costs = cost_of_strategies(call, routing, scores, menu, basis, positions)
            self._costs[name].append(costs)
        self._scores.append(scores[0])
        self._bases.append(basis)

    def _sight(self, name: str) -> Sight:
        layer: Any = self.cache.layers[self._layers[0]]
        sizes = pair_sizes(self._menus.get(name), layer.keys.shape[-1])
        return Sight.of(torch.cat([costs[:, 0] for costs in self._costs[name]], dim=1), *sizes)

    @torch.no_grad()
    def divergences(self, requests: Sequence[Request]) -> Tensor:
        """Mean KL divergence from the full cache's answer, in nats, of the cache of each request: (R,)."""
        kept = [self._kept(name, share) for name, share in requests]
        selections = Selections(self.cache, self._layers)
        answers = evaluate_caches(self.model, selections, self.prompt, self._reference, kept)
        return torch.tensor([answer.kl for answer in answers])

    def _kept(self, name: str, share: float) -> Kept:
        """What the cache of a press keeps."""
        press, n_read = self.presses[name], self.prompt.context.shape[1]
        if press.precision is None:
            n_kept = max(1, int(n_read * share))
            masks = allocate(self._scores, 1 - share, press.scope, press.min_share, ours=True, n_kept=n_kept)
            return Kept(masks, None, n_read)
        settings = (self._menus[name], self._bases, press.scope, press.min_share)
        coded = by_cost(self._costs[name], 1 - share, *settings)
        masks = [strategies > 0 for strategies in coded.strategies]
        return Kept(masks, None, n_read, coded=coded, n_bytes=coded.n_bytes)
