"""kvpress's own scorers: their names, what their scores depend on, and how to run them on any prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import kvpress
import torch
from kvpress import ScorerPress
from torch import Tensor

from kvpress_moe.experts.layer_call import LayerCall, latest_attention
from kvpress_moe.model.attention import softcap

#: Scorers of kvpress 0.5.5 that need no weights of their own.
KVPRESS_EXPERTS: dict[str, Callable[[], ScorerPress]] = {
    "cap": kvpress.CapPress,
    "compactor": kvpress.CompactorPress,
    "cur": kvpress.CURPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "lagkv": kvpress.LagKVPress,
    "leverage": kvpress.LeverageScorePress,
    "non_causal": kvpress.NonCausalAttnPress,
    "observed_attention": kvpress.ObservedAttentionPress,  # eager attention only
    "pyramidkv": kvpress.PyramidKVPress,  # as a scorer the same as snapkv: its pyramid is a budget
    "random": partial(kvpress.RandomPress, seed=0),  # a control
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
}


@dataclass(frozen=True)
class ScorerTraits:
    """
    What the scores of one of kvpress's scorers depend on.

    Attributes
    ----------
    reads_ratio : bool
        Whether its scores change with ``compression_ratio``.
    draws : {"", "sketch", "scores"}
        What it draws random numbers for: a sketch of the keys (from the global generator), or the scores themselves.
    attends : bool
        Whether it computes the attention of the latest queries.
    sinks_are_pairs : bool
        Whether its first tokens are counted among the pairs, not among the hidden states.
    float32 : tuple of str
        Which of keys and values it has to get in float32: those that its scores depend on alone and that it does not
        convert itself. Real keys are similar to each other. With the 8 significant bits of bfloat16 their cosines are
        almost equal.
    """

    reads_ratio: bool = False
    draws: str = ""
    attends: bool = False
    sinks_are_pairs: bool = False
    float32: tuple[str, ...] = ()


TRAITS: dict[type[ScorerPress], ScorerTraits] = {
    kvpress.CapPress: ScorerTraits(),
    kvpress.CompactorPress: ScorerTraits(reads_ratio=True, draws="sketch"),
    kvpress.CriticalKVPress: ScorerTraits(reads_ratio=True),
    kvpress.CURPress: ScorerTraits(draws="sketch", float32=("keys", "values")),
    kvpress.ExpectedAttentionPress: ScorerTraits(),
    kvpress.KeyDiffPress: ScorerTraits(float32=("keys",)),
    kvpress.KnormPress: ScorerTraits(),
    kvpress.LagKVPress: ScorerTraits(sinks_are_pairs=True),
    kvpress.LeverageScorePress: ScorerTraits(draws="sketch"),
    kvpress.NonCausalAttnPress: ScorerTraits(),
    kvpress.ObservedAttentionPress: ScorerTraits(),
    kvpress.PyramidKVPress: ScorerTraits(attends=True),
    kvpress.RandomPress: ScorerTraits(draws="scores"),
    kvpress.SnapKVPress: ScorerTraits(attends=True),
    kvpress.StreamingLLMPress: ScorerTraits(reads_ratio=True, sinks_are_pairs=True),
    kvpress.TOVAPress: ScorerTraits(attends=True),
}


def traits(scorer: ScorerPress) -> ScorerTraits:
    """The traits of a scorer's class, or of its nearest base class in the table."""
    known = (TRAITS[base] for base in type(scorer).__mro__ if base in TRAITS)
    return next(known, ScorerTraits())


def reads_ratio(scorer: ScorerPress) -> bool:
    """Whether scores may change with the ratio. They may if the class is not in the table."""
    return type(scorer) not in TRAITS or TRAITS[type(scorer)].reads_ratio


def draws_numbers(scorer: ScorerPress) -> bool:
    """Whether two calls of a scorer may give different scores."""
    if isinstance(scorer, kvpress.CURPress):
        return bool(scorer.use_random_leverage)
    return bool(traits(scorer).draws)


def known_attentions(scorer: ScorerPress, call: LayerCall) -> Tensor | None:
    """
    Attention weights for a scorer: those that the layer returned, if it returned any.

    kvpress does not know soft caps. So if the layer's logits have a soft cap, scorers that would compute the attention
    of the latest queries get this attention from here.
    """
    if call.attentions is None and softcap(call.module) and traits(scorer).attends:
        return latest_attention(call, getattr(scorer, "window_size", 1))
    return call.attentions


def exact_pairs(scorer: ScorerPress, call: LayerCall) -> tuple[Tensor, Tensor]:
    """Keys and values for a scorer, in float32 if it needs this, see :class:`ScorerTraits`."""
    exact = TRAITS[type(scorer)].float32 if type(scorer) in TRAITS else ()
    keys, values = call.keys, call.values
    return keys.float() if "keys" in exact else keys, values.float() if "values" in exact else values


def fitting_settings(scorer: ScorerPress, call: LayerCall) -> dict[str, Any]:
    """
    Shorter windows and sinks for a scorer, if its own are too long for the input: half of the input.

    kvpress asserts that they are shorter than the input.
    """
    settings: dict[str, Any] = {}
    for names, available in (
        (("window_size",), min(call.k_len, call.q_len)),  # latest queries
        (("n_sink",), call.k_len if traits(scorer).sinks_are_pairs else min(call.k_len, call.q_len)),
        (("sink_size_start", "sink_size_end"), call.k_len),
    ):
        lengths: list[Any] = [getattr(scorer, name, None) for name in names]
        if all(isinstance(length, int) for length in lengths) and sum(lengths) >= available:
            settings.update(dict.fromkeys(names, available // (2 * len(names))))
    return settings


@contextmanager
def temporarily(scorer: ScorerPress, settings: dict[str, Any]) -> Iterator[None]:
    """Set attributes of a scorer for one call."""
    before = {name: getattr(scorer, name) for name in settings}
    try:
        for name, setting in settings.items():
            setattr(scorer, name, setting)
        yield
    finally:
        for name, setting in before.items():
            setattr(scorer, name, setting)


@contextmanager
def same_sketch(scorer: ScorerPress, call: LayerCall) -> Iterator[None]:
    """Let scorers that draw a random sketch draw the same one at each call. The global generators keep their state."""
    if traits(scorer).draws != "sketch":
        yield
        return
    device = call.keys.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
        seed(call.layer_idx)
        yield
