"""Shared prefill: one prefill for all methods. All presses see each layer, and only what they keep is stored."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import kvpress
import torch
from kvpress import ScorerPress
from kvpress.presses.base_press import BasePress
from kvpress.utils import compute_n_kept
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.benchmark.byte_strategies import (
    ELEMENT_SIZE,
    CostTaker,
    LossTaker,
    at_one_precision,
    pairs_that_fit,
)
from kvpress_moe.benchmark.methods import Budget, Method
from kvpress_moe.benchmark.protected_tokens import protect
from kvpress_moe.benchmark.quantised_caches import QUANTISED
from kvpress_moe.benchmark.score_cache import ScoreCache
from kvpress_moe.benchmark.selections import Cell, Kept, Selections
from kvpress_moe.budget.allocation import least_pairs, share
from kvpress_moe.budget.eviction import best, kept_mask
from kvpress_moe.cache.key_hash import KeyIndex
from kvpress_moe.codes.precision import Precision
from kvpress_moe.experts.kvpress_scorers import reads_ratio
from kvpress_moe.model.hooks import hooked, prepared
from kvpress_moe.model.layers import Attention, full_attention_layers, full_attentions
from kvpress_moe.model.transformers_api import attention_arguments, with_cache
from kvpress_moe.press.moe_router_press import MoERouterPress


def set_ratio(press: BasePress, ratio: float) -> None:
    """Set the share that a press (and, through its wrappers, its scorer) removes."""
    press.compression_ratio = ratio


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Inside the block a press draws the same random numbers, whichever press ran before it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also store a traceback, even without a GPU
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


def ratio_free(press: ScorerPress) -> bool:
    """Whether a press scores the same at every compression ratio."""
    if isinstance(press, MoERouterPress):
        return not any(expert.reads_ratio for expert in press._experts)
    return not reads_ratio(press)


class _Clock:
    """A clock for the time spent in presses, and the sum of it."""

    def __init__(self, device: torch.device):
        self.total = 0.0
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Scores:
    """The scores (H, S) of one scorer, layer by layer; for each ratio if they depend on it."""

    def __init__(self, press: ScorerPress, ratios: Sequence[float]):
        self.press, self.ratios = press, ratios
        self.free = ratio_free(press)
        self.layers: dict[float, list[Tensor]] = {ratio: [] for ratio in ratios}
        self.seconds = dict.fromkeys(ratios, 0.0)

    def add_layer(self, module: Attention, arguments: tuple[Any, ...], clock: _Clock) -> None:
        score = None
        for ratio in self.ratios:
            start = clock.now()
            if score is None or not self.free:
                set_ratio(self.press, ratio)
                with fixed_seed(module.layer_idx):
                    score = self.press.score(module, *arguments)[0]
                spent = clock.now() - start
            self.layers[ratio].append(score)
            self.seconds[ratio] += spent


class _Selection:
    """What a press keeps in its own ``compress``, found by comparison with the pairs that it was given."""

    def __init__(self, press: BasePress, ratios: Sequence[float]):
        self.press, self.ratios = press, ratios
        self.kept: dict[float, Any] = {ratio: Kept([], []) for ratio in ratios}  # filled layer by layer

    def add_layer(self, module: Attention, arguments: tuple[Any, ...], clock: _Clock) -> None:
        hidden_states, keys, values, attentions, kwargs = arguments
        index: KeyIndex | None = None
        for ratio in self.ratios:
            set_ratio(self.press, ratio)
            start = clock.now()
            with fixed_seed(module.layer_idx):
                arguments = (hidden_states, keys.clone(), values.clone(), attentions, kwargs)
                new_keys, new_values = self.press.compress(module, *arguments)
            kept = self.kept[ratio]
            kept.seconds += clock.now() - start
            masked = take_masked(module)
            mask: Any = torch.ones(keys.shape[1:3], dtype=torch.bool, device=keys.device)
            if masked is not None:
                mask[masked[1].to(mask.device), masked[2].to(mask.device)] = False
            elif new_keys.shape[2] < keys.shape[2] or not torch.equal(new_keys, keys):
                index = KeyIndex(keys) if index is None else index
                mask = find_kept(new_keys, new_values, values, index)
            kept.mask.append(mask)
            kept.altered.append((list(new_keys[0]), list(new_values[0])) if mask is None else None)

    def result(self, ratio: float, selections: Selections) -> Kept:
        kept = self.kept[ratio]
        found: Kept = kept
        n_read = selections.cache.get_seq_length()
        rerotated = isinstance(self.press, kvpress.KeyRerotationPress)
        kept.next_position = kept.altered[0][0][0].shape[0] if rerotated else n_read
        if all(mask is not None for mask in kept.mask):
            kept.altered = None
            return found
        for number, (layer_idx, mask) in enumerate(zip(selections.layers, kept.mask, strict=True)):
            if mask is not None:  # the press changed no pair of this layer
                layer: Any = selections.cache.layers[layer_idx]
                kept.altered[number] = (pick(layer.keys[0], mask), pick(layer.values[0], mask))
        kept.mask = []
        return found


def pick(pairs: Tensor, mask: Tensor) -> list[Tensor]:
    """Of pairs (H, S, D), those marked in ``mask`` (H, S), head by head."""
    return [head[kept] for head, kept in zip(pairs, mask, strict=True)]


def take_masked(module: Attention) -> tuple[Tensor, ...] | None:
    """Remove and return the pairs (batch, head, position) that a head-wise press masked on an attention layer."""
    masked = getattr(module, "masked_key_indices", None)
    module.masked_key_indices = None
    return masked


def allocate(
    scores: Sequence[Tensor],
    ratio: float,
    budget: str,
    min_share: float,
    ours: bool = False,
    n_kept: int | None = None,
) -> list[Tensor]:
    """
    Which pairs stay under a budget: scores (H, S) of each layer -> masks (H, S) of each layer.

    "uniform" is the selection of ``ScorerPress.compress``, which does not define which of equal scores stay, or, for
    ``ours``, :func:`kvpress_moe.budget.eviction.best`. "layer" and "global" are
    :func:`kvpress_moe.budget.allocation.share`. ``n_kept``: pairs that a head keeps on average, if not by the ratio.
    """
    n_kept = compute_n_kept(scores[0].shape[-1], ratio) if n_kept is None else n_kept
    if budget == "uniform" and ours:
        return [best(score, n_kept) for score in scores]
    if budget == "uniform":
        masks = []
        for score in scores:
            indices = score[None].topk(n_kept, dim=-1).indices
            masks.append(torch.zeros_like(score[None], dtype=torch.bool).scatter_(-1, indices, True)[0])
        return masks
    floor = least_pairs(n_kept, min_share)
    if budget == "layer":
        return [share(score[None].float(), n_kept, floor)[0] for score in scores]
    heads = [score.shape[0] for score in scores]
    pooled = torch.cat([score.float() for score in scores])[None]  # (1, L·H, S)
    return list(share(pooled, n_kept, floor)[0].split(heads))


def kept_under(scores: Sequence[Tensor], ratio: float, method: Method, min_share: float, head_dim: int) -> Kept:
    """The pairs with the best scores (H, S) of each layer, as they are or at the method's precision."""
    budget, ours, n_read = cast(Budget, method.budget), method.group == "ours", scores[0].shape[-1]
    if not isinstance(method.precision, Precision):
        return Kept(allocate(scores, ratio, budget, min_share, ours), None, n_read)
    fitting = pairs_that_fit(n_read, ratio, method.precision, head_dim)
    masks = allocate(scores, ratio, budget, min_share, ours, fitting)
    coded = at_one_precision(masks, method.precision, head_dim)
    return Kept(masks, None, n_read, coded=coded, n_bytes=coded.n_bytes)


def quantised(name: str, selections: Selections, sinks: int, recent: int) -> Kept:
    """All pairs, coded by a quantised cache. The first and the last tokens stay as they are."""
    share, make = QUANTISED[name]
    code = make()
    altered, n_bytes, started = [], 0.0, time.perf_counter()
    for layer_idx in selections.layers:
        layer: Any = selections.cache.layers[layer_idx]
        n_pairs = layer.keys.shape[2]
        middle = slice(min(sinks, n_pairs), max(sinks, n_pairs - recent))
        keys, values = layer.keys.clone(), layer.values.clone()
        if keys[:, :, middle].shape[2]:
            keys[:, :, middle], values[:, :, middle] = code(keys[:, :, middle], values[:, :, middle])
        altered.append((list(keys[0]), list(values[0])))
        coded = keys[:, :, middle].numel() * 2 * ELEMENT_SIZE
        n_bytes += share * coded + (keys.numel() * 2 * ELEMENT_SIZE - coded)
    seconds = time.perf_counter() - started
    return Kept([], altered, selections.cache.get_seq_length(), seconds, n_bytes=round(n_bytes))


def find_kept(new_keys: Tensor, new_values: Tensor, values: Tensor, index: KeyIndex) -> Tensor | None:
    """Which of the given pairs (1, H, S, D) a press returned, as a mask (H, S); None if it changed any."""
    positions = index.find(new_keys)
    if positions is None:
        return None
    if not torch.equal(values.gather(2, positions[..., None].expand_as(new_values)), new_values):
        return None
    return kept_mask(positions, values.shape[2])[0]


@torch.no_grad()
def select_pairs(
    model: PreTrainedModel,
    input_ids: Tensor,
    methods: dict[str, Method],
    cells: Iterable[Cell],
    sinks: int,
    recent: int,
    min_share: float = 0.2,
) -> Selections:
    """
    Prefill a prompt once and find what each method keeps at each ratio.

    A press acts after a layer's attention, so its choice does not change what the next layers compute. Scoring each
    layer during one prefill gives exactly what the hooked press would keep. In memory are the full cache, one score per
    pair and scorer, and one boolean per pair and cell, but never the hidden states of more than one layer.

    Methods with their own prefill are left to :func:`kvpress_moe.benchmark.multi_pass.select_in_own_prefill`.

    Parameters
    ----------
    model : PreTrainedModel
        No press compresses its layers with sliding-window attention.
    input_ids : Tensor, shape (1, S)
    methods : dict of str -> Method
    cells : iterable of (method, ratio)
        What to find.
    sinks, recent : int
        Number of first and of last tokens that every scorer must keep.
    min_share : float
        With ``"layer"`` and ``"global"`` budgets, each head keeps at least this share of the mean.
    """
    ratios: dict[str, list[float]] = {}
    for name, ratio in cells:
        ratios.setdefault(name, []).append(ratio)
    memo = ScoreCache()

    def protecting(scorer: ScorerPress) -> ScorerPress:
        return protect(memo.remember(scorer), sinks, recent)

    shared = {name: methods[name] for name in ratios if name != "full" and not methods[name].own_prefill}
    scorers: dict[str, _Scores] = {}
    own: dict[str, _Selection] = {}  # presses that select in their own compress
    costs: dict[str, CostTaker] = {}
    for name, method in shared.items():
        if method.fixed_share is not None:
            continue
        if isinstance(method.precision, str):
            press: Any = method.make(lambda scorer: scorer)
            costs[name] = CostTaker(memo.remember(press), method, sinks, recent)
        elif method.budget is None:
            own[name] = _Selection(method.make(protecting), ratios[name])
        else:
            same = [
                other.name
                for other in shared.values()
                if other.scorer == method.scorer and other.budget and not isinstance(other.precision, str)
            ]
            wanted = sorted({ratio for other in same for ratio in ratios[other]})
            if method.scorer not in scorers:
                scorers[method.scorer] = _Scores(method.make(protecting), wanted)
    passing: list[_Scores | _Selection | CostTaker | LossTaker] = [*scorers.values(), *own.values(), *costs.values()]
    losses = None
    if any(methods[name].precision == "weighed" for name in ratios):
        losses = LossTaker(memo.remember(MoERouterPress(precision="mixed")))
        passing.append(losses)

    clock = _Clock(model.device)
    cache = DynamicCache()

    def pass_layer(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        start = clock.now()
        memo.clear()
        layer = cache.layers[module.layer_idx]
        kwargs = attention_arguments(module, kwargs)
        for taker in passing:
            taker.add_layer(module, (kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs), clock)
        clock.total += clock.now() - start

    start = clock.now()
    presses = [taker.press for taker in passing]
    with prepared(model, presses), hooked(full_attentions(model), pass_layer):
        model.model(input_ids=input_ids.to(model.device), **with_cache(cache))
    seconds = clock.now() - start - clock.total
    selections = Selections(cache, full_attention_layers(model), losses=losses, prefill_seconds=seconds)

    head_dim = cache.layers[selections.layers[0]].keys.shape[-1]  # type: ignore[union-attr]
    for name in ratios:
        method = methods[name]
        for ratio in ratios[name]:
            if method.fixed_share is not None:
                selections.kept[name, ratio] = quantised(name, selections, sinks, recent)
            elif name in costs:
                start = clock.now()
                coded = costs[name].result(ratio, min_share)
                spent = costs[name].seconds + clock.now() - start
                masks = [layer > 0 for layer in coded.strategies]
                selections.kept[name, ratio] = Kept(masks, None, input_ids.shape[1], spent, coded, coded.n_bytes)
            elif name in own:
                selections.kept[name, ratio] = own[name].result(ratio, selections)
            elif name in shared:
                scores = scorers[method.scorer]
                start = clock.now()
                kept = kept_under(scores.layers[ratio], ratio, method, min_share, head_dim)
                kept.seconds = scores.seconds[ratio] + clock.now() - start
                selections.kept[name, ratio] = kept
    return selections
