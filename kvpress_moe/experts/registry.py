"""The compression experts: who judges a KV pair, under which name, keeping how much when left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import kvpress
import torch
from kvpress import ScorerPress
from torch import Tensor

from kvpress_moe.errors import ExpertError, SettingError
from kvpress_moe.experts.builtin import score_learned, score_selective, score_temporal
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.windows import score_window, window_keep_fraction
from kvpress_moe.model.attention import latest_attention, softcap

ScoreFunction = Callable[..., Tensor]

#: The guide's table, in its order. ``experts=None`` takes the first ``num_experts`` of it.
NAMED_EXPERTS = (
    "aggressive",
    "moderate",
    "conservative",
    "selective",
    "ultra_aggressive",
    "semantic_aware",
    "temporal_aware",
    "adaptive",
)

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

#: Sets that a single name stands for.
EXPERT_SETS = {
    "guide": NAMED_EXPERTS,
    "strong": ("leverage", "cur", "non_causal", "keydiff"),
}

_KEYS_ONLY = (kvpress.StreamingLLMPress, kvpress.LagKVPress)  # their sinks are pairs, not hidden states
_ATTENDING = (kvpress.SnapKVPress, kvpress.TOVAPress)  # compute the attention of the latest queries
_UNSEEDED = (kvpress.LeverageScorePress, kvpress.CompactorPress, kvpress.CURPress)  # may draw numbers in score


@dataclass(eq=False)
class Expert:
    """
    One judge of KV pairs.

    Parameters
    ----------
    name : str
        What ``expert_strategies`` and the statistics call it.
    scorer : ScorerPress or callable
        A kvpress scorer; or ``f(module, hidden_states, keys, values, attentions, kwargs) -> (B, H, S)``, the signature
        of ``ScorerPress.score``.
    keep : float or callable
        Share of the pairs it keeps when left alone (``compression_ratio=None``), or a function of the prompt's length.
    registered : bool, default=False
        Whether the name alone says what it is.
    """

    name: str
    scorer: ScorerPress | ScoreFunction
    keep: float | Callable[[int], float] = 0.5
    registered: bool = False

    @property
    def spec(self) -> str | ScorerPress | ScoreFunction:
        """What to write into ``experts=`` to get it again."""
        return self.name if self.registered else self.scorer

    def keep_fraction(self, k_len: int) -> float:
        return self.keep(k_len) if callable(self.keep) else self.keep

    def score(self, call: LayerCall, compression_ratio: float | None) -> Tensor:
        """
        Judge all pairs of a call.

        Parameters
        ----------
        call : LayerCall
        compression_ratio : float or None
            Told to scorers that depend on theirs (StreamingLLM, Compactor, CriticalKV); ``None`` leaves them their own.

        Returns
        -------
        Tensor, shape (B, H, S)
            Higher = keep.

        Raises
        ------
        ExpertError
            If the scorer fails, or returns a wrong shape or NaN.
        """
        if call.k_len == 1:
            return call.keys.new_zeros(call.keys.shape[:3])  # nothing to compare; several scorers cannot run
        try:
            scores = self._score(call, compression_ratio)
        except (ExpertError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ExpertError(
                f"expert {self.name!r} failed on layer {call.layer_idx} with {call.k_len} pairs and hidden states of "
                f"{call.q_len} tokens: {str(error) or type(error).__name__}. Leave it out of `experts`."
            ) from error
        if scores.shape != call.keys.shape[:3]:
            raise ExpertError(
                f"expert {self.name!r} returned scores of shape {tuple(scores.shape)}, expected (batch, KV heads, "
                f"pairs) = {tuple(call.keys.shape[:3])}. It cannot judge this call; leave it out of `experts`."
            )
        if bool(scores.isnan().any()):
            raise ExpertError(
                f"expert {self.name!r} scored NaN on layer {call.layer_idx}. Check the model's dtype "
                f"({call.keys.dtype}) or leave the expert out of `experts`."
            )
        return scores

    def _score(self, call: LayerCall, compression_ratio: float | None) -> Tensor:
        if not isinstance(self.scorer, ScorerPress):
            return self.scorer(
                call.view, call.hidden_states, call.keys, call.values, call.attentions, call.expert_kwargs
            )
        settings = fitting_settings(self.scorer, call)
        if compression_ratio is not None:
            settings["compression_ratio"] = compression_ratio
        with temporarily(self.scorer, settings), seeded(self.scorer, call):
            attentions, (keys, values) = known_attentions(self.scorer, call), exact_pairs(self.scorer, call)
            arguments = (call.view, call.hidden_states, keys, values, attentions, call.expert_kwargs)
            scores: Tensor = self.scorer.score(*arguments)
        return scores


class OwnExpert(Expert):
    """An expert of this package: its scorer takes the LayerCall itself, to use what the call has computed already."""

    def _score(self, call: LayerCall, compression_ratio: float | None) -> Tensor:
        return self.scorer(call)


def known_attentions(scorer: ScorerPress, call: LayerCall) -> Tensor | None:
    """
    Attention weights for a scorer: those that the layer returned; where its logits have a soft cap, which kvpress does
    not know of, those of the latest queries for scorers that would compute them.
    """
    if call.attentions is None and softcap(call.module) and isinstance(scorer, _ATTENDING):
        return latest_attention(call, getattr(scorer, "window_size", 1))
    return call.attentions


def exact_pairs(scorer: ScorerPress, call: LayerCall) -> tuple[Tensor, Tensor]:
    """
    Keys and values for a scorer: in float32 for those that judge by nothing else and do not turn to it themselves.

    Real keys have much in common: with the 8 bits of a bfloat16, their cosines hardly tell them apart.
    """
    if type(scorer) is kvpress.KeyDiffPress:
        return call.keys.float(), call.values
    if type(scorer) is kvpress.CURPress:
        return call.keys.float(), call.values.float()
    return call.keys, call.values


def fitting_settings(scorer: ScorerPress, call: LayerCall) -> dict[str, Any]:
    """Windows and sinks that kvpress asserts to be shorter than the input; half of it where they are not."""
    settings: dict[str, Any] = {}
    for names, available in (
        (("window_size",), min(call.k_len, call.q_len)),  # latest queries
        (("n_sink",), call.k_len if isinstance(scorer, _KEYS_ONLY) else min(call.k_len, call.q_len)),
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
def seeded(scorer: ScorerPress, call: LayerCall) -> Iterator[None]:
    """Give scorers that draw a random sketch the same one at each call, and leave the global generators alone."""
    if not isinstance(scorer, _UNSEEDED):
        yield
        return
    device = call.keys.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
        seed(call.layer_idx)
        yield


def named_expert(name: str) -> Expert:
    """A fresh expert by its registered name."""
    if name in ("aggressive", "moderate", "conservative", "ultra_aggressive", "adaptive"):
        return OwnExpert(name, partial(score_window, name=name), partial(window_keep_fraction, name), registered=True)
    if name == "selective":
        return OwnExpert(name, score_selective, registered=True)
    if name == "semantic_aware":
        return Expert(name, kvpress.KeyDiffPress(), registered=True)
    if name == "learned":
        return OwnExpert(name, score_learned, registered=True)
    if name == "temporal_aware":
        return OwnExpert(name, score_temporal, registered=True)
    if name in KVPRESS_EXPERTS:
        return Expert(name, KVPRESS_EXPERTS[name](), registered=True)
    raise SettingError(
        "experts",
        name,
        f"one of {', '.join(sorted((*NAMED_EXPERTS, *KVPRESS_EXPERTS, 'learned')))}",
        "A name of your own needs a subclass that overrides `_apply_expert_compression`.",
    )


def make_expert(given: str | ScorerPress | ScoreFunction | Expert) -> Expert:
    """
    An expert from what a user may write: a name, a kvpress scorer, or a function.

    A scorer's own keep fraction is ``1 - compression_ratio``, read when the expert is made; a function's is one half.
    """
    if isinstance(given, Expert):
        return given
    if isinstance(given, str):
        return named_expert(given)
    if isinstance(given, ScorerPress):
        ratio = getattr(given, "compression_ratio", None)
        return Expert(type(given).__name__, given, 0.5 if ratio is None else 1 - ratio)
    if callable(given) and not isinstance(given, (type, kvpress.BasePress)):
        return Expert(getattr(given, "__name__", type(given).__name__), given)
    remedy = "Give scorers as instances, not classes." if isinstance(given, type) else ""
    if isinstance(given, kvpress.BasePress):
        remedy = f"{type(given).__name__} does not score pairs; wrap it around MoERouterPress instead."
    raise SettingError(
        "experts", given, "a name, a kvpress ScorerPress or a function", remedy or "See docs/guide.en.md."
    )


def expert_specs(experts: str | Iterable[Any] | None, num_experts: int) -> Sequence[Any]:
    """What ``experts=`` stands for: a set's names, the given list, or the first ``num_experts`` of the table."""
    if experts is None:
        return NAMED_EXPERTS[:num_experts]
    if isinstance(experts, str):
        if experts not in EXPERT_SETS:
            raise SettingError(
                "experts", experts, f"a set ({', '.join(EXPERT_SETS)}) or a list of experts", f"Write [{experts!r}]."
            )
        return EXPERT_SETS[experts]
    return list(experts)
