"""One prefill, every method: each layer is judged by all presses as it passes, and only what they keep is held."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, cast

import kvpress
import torch
from kvpress import ScorerPress
from kvpress.presses.base_press import BasePress
from kvpress.utils import compute_n_kept
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.benchmark.methods import Budget, Method
from kvpress_moe.benchmark.protected_tokens import protect
from kvpress_moe.budget.allocation import share
from kvpress_moe.budget.eviction import best
from kvpress_moe.experts.custom import fingerprints
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.registry import OwnExpert
from kvpress_moe.model.attention_view import own_layer_type
from kvpress_moe.model.layers import Attention, full_attention_layers, full_attentions, language_model
from kvpress_moe.press.moe_router_press import MoERouterPress

Cell = tuple[str, float]  # method, compression ratio

#: Scorers whose scores do not depend on the ratio: one scoring serves all.
_RATIO_FREE = (
    kvpress.RandomPress,
    kvpress.KnormPress,
    kvpress.KeyDiffPress,
    kvpress.LagKVPress,
    kvpress.CURPress,
    kvpress.SnapKVPress,
    kvpress.TOVAPress,
    kvpress.ExpectedAttentionPress,
    kvpress.CapPress,
    kvpress.LeverageScorePress,
    kvpress.NonCausalAttnPress,
)

#: Those of them that draw random numbers.
_DRAWING = (kvpress.RandomPress, kvpress.LeverageScorePress)


@dataclass
class Kept:
    """
    What a method left of one prompt's cache.

    Attributes
    ----------
    mask : list of Tensor, each (H, S), bool
        Per layer with full attention, the pairs that stayed.
    altered : list of (keys, values), each a list of H tensors (K, D), or None
        Per layer with full attention and head the pairs themselves, where a press changed them (merged values, turned
        keys).
    next_position : int
        Position of the next token; smaller than S where keys were turned to new positions.
    seconds : float
        Time that scoring and selecting took.
    """

    mask: list[Tensor]
    altered: list[tuple[list[Tensor], list[Tensor]]] | None = None
    next_position: int = 0
    seconds: float = 0.0

    @property
    def n_pairs(self) -> int:
        """Pairs that stayed, counted."""
        if self.altered is not None:
            return sum(len(head) for keys, _ in self.altered for head in keys)
        return int(sum(mask.sum() for mask in self.mask))


@dataclass
class Judged:
    """
    A prompt's full cache and what every method would keep of it.

    Attributes
    ----------
    cache : DynamicCache
        Full, batch 1.
    layers : list of int
        Those with full attention, the only ones that are judged: the others' caches are bounded anyway.
    kept : dict of (method, ratio) -> Kept
    prefill_seconds : float
        Of the shared prefill, without the time that presses took.
    """

    cache: DynamicCache
    layers: list[int]
    kept: dict[Cell, Kept] = field(default_factory=dict)
    prefill_seconds: float = 0.0


def set_ratio(press: BasePress, ratio: float) -> None:
    """Tell a press (and, through its wrappers, its scorer) how much to remove."""
    press.compression_ratio = ratio


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Presses that draw random numbers draw the same ones whoever was judged before them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a traceback for a GPU that may never come
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


def ratio_free(press: BasePress) -> bool:
    """Whether a press scores the same at every compression ratio."""
    if isinstance(press, MoERouterPress):
        experts = (expert for expert in press._experts if not isinstance(expert, OwnExpert))
        return all(type(expert.scorer) in _RATIO_FREE for expert in experts)
    return type(press) in _RATIO_FREE


class _Clock:
    """Time spent in presses: in all, and by cell."""

    def __init__(self, device: torch.device):
        self.total = 0.0
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Memo:
    """
    Scores of the layer that is passing, so that a scorer inside several wrappers, or under several ratios, runs once.

    Only for scorers that a ratio does not change; those that draw random numbers share nothing with other presses,
    because what they draw depends on what was drawn before.
    """

    def __init__(self) -> None:
        self._scores: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        self._scores.clear()

    def remember(self, scorer: ScorerPress) -> ScorerPress:
        """Let this scorer (ours: its experts) look up what it was asked before; returns the same scorer."""
        if isinstance(scorer, MoERouterPress):
            return self._remember_experts(scorer)
        if type(scorer) not in _RATIO_FREE or hasattr(scorer.score, "__wrapped__"):
            return scorer
        score = scorer.score

        @wraps(score)
        def remembered(
            module: Attention, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
        ) -> Any:
            inputs = kwargs["hidden_states"].untyped_storage().data_ptr()
            if hidden_states.untyped_storage().data_ptr() != inputs:  # gathered: nothing says which tokens these are
                return score(module, hidden_states, keys, values, attentions, kwargs)
            # a slice of the layer's inputs says which keys these are: presses score before they change any
            about = (_who(scorer), type(module), hidden_states.data_ptr(), hidden_states.shape, keys.shape)
            if about not in self._scores:
                self._scores[about] = score(module, hidden_states, keys, values, attentions, kwargs)
            return self._scores[about]

        object.__setattr__(scorer, "score", remembered)
        return scorer

    def _remember_experts(self, press: MoERouterPress) -> MoERouterPress:
        mix = press.mix

        @wraps(mix)
        def remembered(call: LayerCall) -> Tensor:
            for expert in press._experts:  # may have changed since: a press chooses its experts when it sees a model
                if isinstance(expert.scorer, ScorerPress):
                    self.remember(expert.scorer)
            return mix(call)

        object.__setattr__(press, "mix", remembered)
        return press


def _who(scorer: ScorerPress) -> tuple[Any, ...]:
    """What two scorers have in common that score alike."""
    if isinstance(scorer, _DRAWING) or getattr(scorer, "use_random_leverage", False):  # CURPress
        return (id(scorer),)
    settings = ((f.name, getattr(scorer, f.name)) for f in fields(scorer) if f.name != "compression_ratio")
    return (type(scorer), repr(sorted(settings)))


class _Scores:
    """The scores (H, S) of one scorer, layer by layer; per ratio where they depend on it."""

    def __init__(self, press: ScorerPress, ratios: Sequence[float]):
        self.press, self.ratios = press, ratios
        self.free = ratio_free(press)
        self.layers: dict[float, list[Tensor]] = {ratio: [] for ratio in ratios}
        self.seconds = dict.fromkeys(ratios, 0.0)

    def judge(self, module: Attention, arguments: tuple[Any, ...], clock: _Clock) -> None:
        score = None
        for ratio in self.ratios:
            start = clock.now()
            if score is None or not self.free:
                set_ratio(self.press, ratio)
                with seeded(module.layer_idx):
                    score = self.press.score(module, *arguments)[0]
                spent = clock.now() - start
            self.layers[ratio].append(score)
            self.seconds[ratio] += spent


class _Selection:
    """What a press keeps in its own ``compress``, found again among the pairs it was given."""

    def __init__(self, press: BasePress, ratios: Sequence[float]):
        self.press, self.ratios = press, ratios
        self.kept: dict[float, Any] = {ratio: Kept([], []) for ratio in ratios}  # in the making

    def judge(self, module: Attention, arguments: tuple[Any, ...], clock: _Clock) -> None:
        hidden_states, keys, values, attentions, kwargs = arguments
        given = None
        for ratio in self.ratios:
            set_ratio(self.press, ratio)
            start = clock.now()
            with seeded(module.layer_idx):
                arguments = (hidden_states, keys.clone(), values.clone(), attentions, kwargs)
                new_keys, new_values = self.press.compress(module, *arguments)
            kept = self.kept[ratio]
            kept.seconds += clock.now() - start
            masked = take_masked(module)
            mask: Any = torch.ones(keys.shape[1:3], dtype=torch.bool, device=keys.device)
            if masked is not None:
                mask[masked[1].to(mask.device), masked[2].to(mask.device)] = False
            elif new_keys.shape[2] < keys.shape[2] or not torch.equal(new_keys, keys):
                given = fingerprints(keys) if given is None else given
                mask = find(new_keys, new_values, keys, values, given)
            kept.mask.append(mask)
            kept.altered.append((list(new_keys[0]), list(new_values[0])) if mask is None else None)

    def result(self, ratio: float, judged: Judged) -> Kept:
        kept = self.kept[ratio]
        found: Kept = kept
        n_read = judged.cache.get_seq_length()
        rerotated = isinstance(self.press, kvpress.KeyRerotationPress)
        kept.next_position = kept.altered[0][0][0].shape[0] if rerotated else n_read
        if all(mask is not None for mask in kept.mask):
            kept.altered = None
            return found
        for number, (layer_idx, mask) in enumerate(zip(judged.layers, kept.mask, strict=True)):
            if mask is not None:  # this layer came through unchanged
                layer: Any = judged.cache.layers[layer_idx]
                kept.altered[number] = (pick(layer.keys[0], mask), pick(layer.values[0], mask))
        kept.mask = []
        return found


def pick(pairs: Tensor, mask: Tensor) -> list[Tensor]:
    """Of pairs (H, S, D), those marked in ``mask`` (H, S), head by head."""
    return [head[kept] for head, kept in zip(pairs, mask, strict=True)]


def take_masked(module: Attention) -> tuple[Tensor, ...] | None:
    """The pairs that a head-wise press masked on an attention layer (batch, head, position); taken off again."""
    masked = getattr(module, "masked_key_indices", None)
    module.masked_key_indices = None
    return masked


def find(new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, given: Tensor) -> Tensor | None:
    """Which of the given pairs (1, H, S, D) a press returned, as a mask (H, S); None if it changed any."""
    kept = fingerprints(new_keys)
    ordered, positions = given.sort(dim=-1)
    found = torch.searchsorted(ordered, kept.contiguous()).clamp(max=given.shape[-1] - 1)
    if not torch.equal(ordered.gather(-1, found), kept):
        return None
    indices = positions.gather(-1, found)
    if not torch.equal(values.gather(2, indices[..., None].expand_as(new_values)), new_values):
        return None
    return torch.zeros(given.shape, dtype=torch.bool, device=keys.device).scatter_(-1, indices, True)[0]


def allocate(scores: Sequence[Tensor], ratio: float, budget: str, min_share: float, ours: bool = False) -> list[Tensor]:
    """
    Which pairs stay, by layer, under a budget: scores (H, S) per layer -> masks (H, S).

    "uniform" is ``ScorerPress.compress``'s own selection, which leaves open what becomes of equal scores, or, for
    ``ours``, :func:`kvpress_moe.budget.eviction.best`; "layer" and "global" are :func:`kvpress_moe.budget.allocation.share`.
    """
    n_kept = compute_n_kept(scores[0].shape[-1], ratio)
    if budget == "uniform" and ours:
        return [best(score, n_kept) for score in scores]
    if budget == "uniform":
        masks = []
        for score in scores:
            indices = score[None].topk(n_kept, dim=-1).indices
            masks.append(torch.zeros_like(score[None], dtype=torch.bool).scatter_(-1, indices, True)[0])
        return masks
    if budget == "layer":
        return [share(score[None].float(), n_kept, min_share)[0] for score in scores]
    heads = [score.shape[0] for score in scores]
    pooled = torch.cat([score.float() for score in scores])[None]  # (1, L·H, S)
    return list(share(pooled, n_kept, min_share)[0].split(heads))


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    input_ids: Tensor,
    methods: dict[str, Method],
    cells: Iterable[Cell],
    sinks: int,
    recent: int,
    min_share: float = 0.2,
) -> Judged:
    """
    Prefill a prompt once and find what each method keeps at each ratio.

    A press acts after a layer's attention, so its choice does not change what the layers above compute: judging each
    layer as it passes gives exactly what the hooked press would keep. Held meanwhile: the full cache, one score per
    pair and scorer, one bit per pair and cell; never the hidden states of more than one layer.

    Methods that need a prefill of their own are left to :func:`kvpress_moe.benchmark.multi_pass.judge_alone`.

    Parameters
    ----------
    model : PreTrainedModel
        Its layers with sliding-window attention are left alone, whatever the press.
    input_ids : Tensor, shape (1, S)
    methods : dict of str -> Method
    cells : iterable of (method, ratio)
        What to judge.
    sinks, recent : int
        Tokens at both ends that every scorer has to keep.
    min_share : float
        Of ``"layer"`` and ``"global"`` budgets.
    """
    ratios: dict[str, list[float]] = {}
    for name, ratio in cells:
        ratios.setdefault(name, []).append(ratio)
    memo = _Memo()

    def protecting(scorer: ScorerPress) -> ScorerPress:
        return protect(memo.remember(scorer), sinks, recent)

    shared = {name: methods[name] for name in ratios if name != "full" and not methods[name].own_prefill}
    scorers: dict[str, _Scores] = {}
    selections: dict[str, _Selection] = {}
    for name, method in shared.items():
        if method.budget is None:
            selections[name] = _Selection(method.make(protecting), ratios[name])
        else:
            same = [other.name for other in shared.values() if other.scorer == method.scorer and other.budget]
            wanted = sorted({ratio for other in same for ratio in ratios[other]})
            if method.scorer not in scorers:
                scorers[method.scorer] = _Scores(method.make(protecting), wanted)
    judges: list[_Scores | _Selection] = [*scorers.values(), *selections.values()]

    clock = _Clock(model.device)
    cache = DynamicCache()

    def pass_layer(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        start = clock.now()
        memo.clear()
        layer = cache.layers[module.layer_idx]
        for judging in judges:
            judging.judge(module, (kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs), clock)
        clock.total += clock.now() - start

    start = clock.now()
    with prepared(model, [judging.press for judging in judges]), ExitStack() as hooks:
        for attention in full_attentions(model):
            hooks.callback(attention.register_forward_hook(pass_layer, with_kwargs=True).remove)
        model.model(input_ids=input_ids.to(model.device), past_key_values=cache)
    judged = Judged(cache, full_attention_layers(model), prefill_seconds=clock.now() - start - clock.total)

    for name in ratios:
        method = methods[name]
        for ratio in ratios[name]:
            if name in selections:
                judged.kept[name, ratio] = selections[name].result(ratio, judged)
            elif name in shared:
                scores = scorers[method.scorer]
                start = clock.now()
                masks = allocate(
                    scores.layers[ratio], ratio, cast(Budget, method.budget), min_share, method.group == "ours"
                )
                seconds = scores.seconds[ratio] + clock.now() - start
                judged.kept[name, ratio] = Kept(masks, None, input_ids.shape[1], seconds)
    return judged


class _OfLayerType(nn.Module):
    """A rotary embedding that is told the layer's type where its caller does not say it."""

    def __init__(self, rotary_emb: nn.Module, layer_type: str):
        super().__init__()
        self.rotary_emb, self.layer_type = rotary_emb, layer_type

    def forward(self, states: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        return self.rotary_emb(states, position_ids, layer_type or self.layer_type)


def of_layer(rotary_emb: nn.Module, attention: Attention) -> nn.Module:
    """The rotary embedding that presses may call as they call every model's."""
    layer_type = own_layer_type(attention)
    return rotary_emb if layer_type is None else _OfLayerType(rotary_emb, layer_type)


@contextmanager
def prepared(model: PreTrainedModel, presses: Iterable[BasePress]) -> Iterator[None]:
    """
    What kvpress does before its hooks: presses see the model, attention layers their rotary embedding.

    Gemma 3 has one embedding for two types of layers and has to be told which; kvpress's presses do not tell it.
    """
    for press in presses:
        press.post_init_from_model(model)
    stack = language_model(model)
    bare = [layer.self_attn for layer in stack.layers if not hasattr(layer.self_attn, "rotary_emb")]
    try:
        for attention in bare:
            attention.rotary_emb = of_layer(stack.rotary_emb, attention)
        yield
    finally:
        for attention in bare:
            attention._modules.pop("rotary_emb", None)
