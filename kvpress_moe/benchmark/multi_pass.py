"""Methods that change the prefill or process the prompt again: each gets its own passes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kvpress
import torch
from kvpress.presses.base_press import BasePress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.byte_strategies import by_cost
from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.protected_tokens import protect
from kvpress_moe.benchmark.selections import Cell, Kept, Selections
from kvpress_moe.benchmark.shared_prefill import fixed_seed, kept_under, pick, set_ratio, take_masked
from kvpress_moe.model.hooks import bare_afterwards
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import language_model
from kvpress_moe.model.transformers_api import with_cache


def select_in_own_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    selections: Selections,
    methods: dict[str, Method],
    cells: Iterable[Cell],
    sinks: int,
    recent: int,
    min_share: float = 0.2,
) -> None:
    """Add what methods with their own prefill keep to ``selections``. Arguments as in ``select_pairs``."""
    input_ids = prompt.context.to(model.device)
    replay: tuple[Tensor, float] | None = None
    for name, ratio in cells:
        method = methods[name]
        if method.scorer == "kvzip":
            if replay is None:
                start = time.perf_counter()
                scores = ReplayScores().of(model, tokenizer, input_ids, selections.cache, prompt.n_prefix)[
                    selections.layers
                ]
                n_prefix = prompt.n_prefix  # never repeated, so KVzip has no score for it; evicted, it costs much
                if 0 < n_prefix < scores.shape[-1]:
                    scores[..., :n_prefix] = scores[..., n_prefix:].mean(-1, keepdim=True)
                replay = scores, time.perf_counter() - start
            if method.precision == "weighed":
                kept = _weighed(replay[0], ratio, method, selections, sinks, recent, min_share)
            else:
                scores = replay[0].clone()
                scores[..., :sinks] = scores[..., max(0, scores.shape[-1] - recent) :] = torch.inf
                layers: list[Any] = selections.cache.layers
                head_dim = layers[selections.layers[0]].keys.shape[-1]
                kept = kept_under(list(scores), ratio, method, min_share, head_dim)
            kept.seconds += replay[1]
            selections.kept[name, ratio] = kept
        elif method.own_prefill:
            press = method.make(partial(protect, sinks=sinks, recent=recent))
            set_ratio(press, ratio)
            selections.kept[name, ratio] = select_hooked(model, input_ids, press, selections, method.eager)


def _weighed(
    attention: Tensor, ratio: float, method: Method, selections: Selections, sinks: int, recent: int, min_share: float
) -> Kept:
    """
    The strategies of pairs whose weight is the attention (L, H, S) that a repetition pays.

    Of the attention the square root is taken: of the powers 0.5, 1, 1.5 and 2 it was the best at 5 % of the bytes on
    four samples of the tune split, and nearly the best at 10 %.
    """
    start, losses = time.perf_counter(), selections.losses
    assert losses is not None
    assert losses.menu is not None
    costs = losses.costs(list(attention.sqrt()), sinks, recent)
    coded = by_cost(costs, ratio, losses.menu, losses.bases, str(method.budget), min_share)
    masks = [layer > 0 for layer in coded.strategies]
    spent = losses.seconds + time.perf_counter() - start
    return Kept(masks, None, attention.shape[-1], spent, coded, coded.n_bytes)


def select_hooked(
    model: PreTrainedModel, input_ids: Tensor, press: BasePress, selections: Selections, eager: bool = False
) -> Kept:
    """Prefill with a hooked press and collect the pairs that it left. Its cost is the time beyond the shared one."""
    teach_kvpress()
    cache = DynamicCache()
    start = time.perf_counter()
    with torch.no_grad(), bare_afterwards(model), attention_of(model, eager), fixed_seed(0), press(model):
        model.model(input_ids=input_ids.to(model.device), **with_cache(cache))
    seconds = max(0.0, time.perf_counter() - start - selections.prefill_seconds)
    altered = []
    layers: list[Any] = cache.layers
    for layer, block in zip(layers, language_model(model).layers, strict=True):
        masked = take_masked(block.self_attn)
        mask = torch.ones(layer.keys.shape[1:3], dtype=torch.bool, device=layer.keys.device)
        if masked is not None:
            mask[masked[1].to(mask.device), masked[2].to(mask.device)] = False
        altered.append((pick(layer.keys[0], mask), pick(layer.values[0], mask)))
    rerotated = isinstance(press, kvpress.KeyRerotationPress)
    return Kept([], altered, len(altered[0][0][0]) if rerotated else input_ids.shape[1], seconds)


@contextmanager
def attention_of(model: PreTrainedModel, eager: bool) -> Iterator[None]:
    """Use eager attention inside the block if asked: only eager attention returns attention weights."""
    before = model.config._attn_implementation
    try:
        if eager:
            model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
