"""MeasuredPrompt: one prefill, and the KL divergence of as many compressed caches as are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.benchmark.byte_strategies import ELEMENT_SIZE, Coded, by_cost, decode_all
from kvpress_moe.benchmark.cache_eval import evaluate_full_cache, read
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.shared_prefill import allocate
from kvpress_moe.cache import RaggedCache, RaggedLayer
from kvpress_moe.cache.masks import WholeSlidingLayer
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
        sizes = pair_sizes(self._menus.get(name), self.prefilled(0).keys.shape[-1])
        return Sight.of(torch.cat([costs[:, 0] for costs in self._costs[name]], dim=1), *sizes)

    def prefilled(self, number: int) -> Any:
        """A layer of the full cache, by its number among the compressed layers."""
        return self.cache.layers[self._layers[number]]

    @torch.no_grad()
    def divergences(self, requests: Sequence[Request]) -> Tensor:
        """
        Mean KL divergence from the full cache's answer, in nats, of the cache of each request, shape (R,).

        All caches answer in one batch.
        """
        kept = [self._compressed(name, share) for name, share in requests]
        ragged = RaggedCache()
        for layer_idx, layer in enumerate(self.cache.layers):
            if layer_idx in self._layers:
                ragged.layers.append(self._stacked(self._layers.index(layer_idx), kept))
            else:
                whole: Any = WholeSlidingLayer()  # type: ignore[no-untyped-call]
                dense: Any = layer
                whole.update(*(pairs.expand(len(kept), -1, -1, -1) for pairs in (dense.keys, dense.values)))
                ragged.layers.append(whole)
        n_read = self.cache.get_seq_length()
        offsets = torch.zeros(len(kept), dtype=torch.long, device=self.model.device)
        logits = read(self.model, ragged, self.prompt, n_read, offsets)
        log_full = self._reference.logits.float().log_softmax(-1)
        likely = log_full.exp()
        found = [(likely * (log_full - own.float().log_softmax(-1))).sum(-1).mean() for own in logits]
        return torch.stack(found).clamp(min=0).cpu()

    def _compressed(self, name: str, share: float) -> Coded | list[Tensor]:
        """Strategies of all pairs, or for a press without a precision the masks (H, S) of the pairs that stay."""
        press = self.presses[name]
        if press.precision is None:
            n_kept = max(1, int(self.prompt.context.shape[1] * share))
            return allocate(self._scores, 1 - share, press.scope, press.min_share, ours=True, n_kept=n_kept)
        return by_cost(self._costs[name], 1 - share, self._menus[name], self._bases, press.scope, press.min_share)

    def _stacked(self, number: int, kept: Sequence[Coded | list[Tensor]]) -> RaggedLayer:
        layer = self.prefilled(number)
        coded = [one for one in kept if isinstance(one, Coded)]
        decoded = iter(decode_all(coded, number, layer.keys, layer.values))
        keys, values, lengths = [], [], []
        for one in kept:
            if isinstance(one, Coded):
                mask = one.strategies[number] > 0
                all_keys, all_values = next(decoded)
            else:
                mask, all_keys, all_values = one[number], layer.keys[0], layer.values[0]
            keys.append(all_keys[mask])
            values.append(all_values[mask])
            lengths.append(mask.sum(-1).tolist())
        return RaggedLayer(torch.cat(keys), torch.cat(values), lengths, layer.get_seq_length())
