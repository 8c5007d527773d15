"""Speed of presses: prefill time, decoding time and peak memory, measured in turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import kvpress
import torch
from kvpress.presses.base_press import BasePress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.cache.attention_dispatch import use_ragged_attention
from kvpress_moe.cache.compiled_products import library
from kvpress_moe.cache.prefill import cache_bytes
from kvpress_moe.errors import SettingError
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import language_model
from kvpress_moe.model.transformers_api import crop, with_cache
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.routers.resolve import shipped_routers

NONE = "no press"
TRAINED = "MoERouter (trained)"  # if the package has routers for the model
MIXED = "MoERouter (mixed)"  # the same, with a precision for each pair
ROUTING = "its router and gate alone"
#: Name -> function that makes the press for a compression ratio; first ours, then those of kvpress.
OURS: dict[str, Callable[[float], BasePress]] = {
    "MoERouter (guide)": partial(MoERouterPress, num_experts=4),
    "MoERouter (guide's eight)": partial(MoERouterPress, num_experts=8),
    "MoERouter (strong)": partial(MoERouterPress, experts="strong"),
    TRAINED: MoERouterPress,
    MIXED: partial(MoERouterPress, precision="mixed"),
}
THEIRS: dict[str, Callable[[float], BasePress]] = {
    "SnapKV": kvpress.SnapKVPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "AdaKV(SnapKV)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "CriticalAdaKV(SnapKV)": lambda ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
}
KVZIP = "KVzip"
PACKED_SHARE = 0.25  # of the bytes of a 16-bit cache
#: Name -> precision and the attention that decodes it, see :func:`kvpress_moe.cache.use_ragged_attention`.
PACKED: dict[str, tuple[Any, str]] = {
    f"25 % of 16 bits, {name}{suffix}": (precision, attention)
    for attention, suffix in (("torch", ""), ("compiled", ", compiled"))
    for name, precision in (("K8V4", [(8, 4)]), ("mixed", "mixed"))
}
DECODED = {"full": 0.0, "50 %": 0.5, "25 %": 0.75}  # what is left of the cache -> compression ratio


@dataclass(frozen=True)
class Row:
    """
    One measurement.

    Attributes
    ----------
    what : {"prefill", "route", "decode"}
        ``"route"``: the part of the trained press's prefill that its routers and gates take.
    name : str
        The press, or how much of the cache is left.
    tokens, batch : int
        Prompt length, and number of prompts.
    seconds, fastest, slowest : float
        Median, minimum and maximum over the rounds, of a prefill with compression or of one decoded token.
    ratio : float
        The median divided by that of no press, or of the full cache.
    extra_peak_bytes : int
        Peak memory of tensors minus that of no press; in a decoding row, the bytes of the cache.
    in_press : float, optional
        Median of the seconds that a prefill spends in the press's hooks. Only on a CPU: a GPU still works when the
        hooks return.
    """

    what: str
    name: str
    tokens: int
    batch: int
    seconds: float
    fastest: float
    slowest: float
    ratio: float
    extra_peak_bytes: int
    in_press: float | None = None


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that some work takes on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """
    Peak of the bytes of tensors that some work holds, without what was held before.

    torch counts it from allocations. Resident memory is not usable, because freed memory stays with the process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()  # kept, so that it is not freed before the end
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@torch.no_grad()
def read_prompt(model: PreTrainedModel, input_ids: Tensor, press: BasePress | None) -> DynamicCache:
    """Prefill with a hooked press, or without a press."""
    teach_kvpress()
    cache = DynamicCache()
    with press(model) if press is not None else _nothing():
        model.model(input_ids=input_ids, **with_cache(cache))
    return cache


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def read_and_replay(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> DynamicCache:
    """KVzip's prefill and scoring pass, without its selection, which only masks pairs."""
    cache = read_prompt(model, input_ids, None)
    ReplayScores().of(model, tokenizer, input_ids, cache)
    return cache


def unmask(model: PreTrainedModel) -> None:
    """Remove the masks that head-wise presses of kvpress leave on the layers."""
    for layer in language_model(model).layers:
        layer.self_attn.masked_key_indices = None


class Stopwatch:
    """Counts the seconds that a press spends in one of its methods."""

    def __init__(self, press: BasePress, method: str):
        self.seconds = 0.0
        timed = getattr(press, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(press, method, watched)

    def take(self) -> float:
        """The seconds since the last call of this."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def prefill_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Tensor,
    ratio: float,
    rounds: int,
    presses: dict[str, Callable[[float], BasePress]],
) -> list[Row]:
    """Prefill with each press in turn, round after round. The first round warms up and counts memory."""
    made = {name: make(ratio) for name, make in presses.items()}
    watches: dict[str, Stopwatch] = {}
    if model.device.type == "cpu":
        watches = {name: Stopwatch(press, "forward_hook") for name, press in made.items()}
        if TRAINED in made:
            watches[ROUTING] = Stopwatch(made[TRAINED], "route")
    works: dict[str, Callable[[], Any]] = {NONE: partial(read_prompt, model, input_ids, None)}
    works |= {name: partial(read_prompt, model, input_ids, press) for name, press in made.items()}
    if tokenizer is not None and len(input_ids) == 1:
        works[KVZIP] = partial(read_and_replay, model, tokenizer, input_ids)
    times: dict[str, list[float]] = {name: [] for name in works}
    inside: dict[str, list[float]] = {name: [] for name in watches}
    peaks: dict[str, int] = {}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            if round_number:
                times[name].append(seconds(model.device, work))
            else:
                peaks[name] = peak_bytes(model.device, work)
            unmask(model)
        for name, watch in watches.items():
            spent = watch.take()
            if round_number:
                inside[name].append(spent)
    base = statistics.median(times[NONE])
    rows = []
    for name in works:
        in_press = statistics.median(inside[name]) if name in inside else None
        rows.append(_row("prefill", name, input_ids, times[name], base, peaks[name] - peaks[NONE], in_press))
        if name == TRAINED and ROUTING in inside:
            rows.append(_row("route", ROUTING, input_ids, inside[ROUTING], base, 0))
    return rows


def decode_rows(
    model: PreTrainedModel, input_ids: Tensor, make: Callable[[float], BasePress], n_new: int, rounds: int
) -> list[Row]:
    """Decode ``n_new`` tokens from each cache in turn, round after round. Afterwards the caches are as before."""
    caches = {left: read_prompt(model, input_ids, make(ratio) if ratio else None) for left, ratio in DECODED.items()}
    attentions = dict.fromkeys(caches, "torch")
    packed: dict[str, Any] = {}  # caches of one precision are the same
    for name, (precision, attention) in PACKED.items():
        if attention == "compiled" and not can_compile(model.device):
            continue
        if str(precision) not in packed:
            press = MoERouterPress(1 - PACKED_SHARE * 2 / model.dtype.itemsize, precision=precision)
            packed[str(precision)] = read_prompt(model, input_ids, press)
        caches[name], attentions[name] = packed[str(precision)], attention
    times: dict[str, list[float]] = {left: [] for left in caches}
    for round_number in range(rounds + 1):
        for left, cache in caches.items():
            before = use_ragged_attention(attentions[left])
            try:
                spent = seconds(model.device, partial(decode, model, cache, input_ids, n_new))
            finally:
                use_ragged_attention(before)
            if round_number:
                times[left].append(spent / n_new)
    base = statistics.median(times["full"])
    return [_row("decode", left, input_ids, times[left], base, cache_bytes(caches[left])) for left in caches]


def can_compile(device: torch.device) -> bool:
    """Whether attention over packed layers can be compiled: on a CPU, with a C compiler."""
    try:
        return device.type == "cpu" and bool(library())
    except SettingError:
        return False


@torch.no_grad()
def decode(model: PreTrainedModel, cache: DynamicCache, input_ids: Tensor, n_new: int) -> None:
    """Feed ``n_new`` tokens one by one, then remove them from the cache again."""
    lengths = [layer.get_seq_length() for layer in cache.layers]
    token = input_ids[:, :1]
    for step in range(n_new):
        position = torch.full_like(token, input_ids.shape[1] + step)
        model(token, **with_cache(cache), position_ids=position)
    for layer, length in zip(cache.layers, lengths, strict=True):
        crop(layer, length)


def _row(
    what: str,
    name: str,
    input_ids: Tensor,
    times: list[float],
    base: float,
    n_bytes: int,
    in_press: float | None = None,
) -> Row:
    batch, tokens = input_ids.shape
    median = statistics.median(times)
    return Row(what, name, tokens, batch, median, min(times), max(times), median / base, n_bytes, in_press)


@dataclass(frozen=True)
class SpeedPlan:
    """
    What to measure.

    Parameters
    ----------
    lengths, batches : tuple of int
    ratio : float
        Compression ratio of the prefills. Decoding is measured with the full cache, half and a quarter of it.
    rounds : int
        Measurements of each row; at least 5 for figures to report.
    new_tokens : int
        Tokens decoded in each round.
    longest : int
        Batches with more tokens than this, all prompts together, are left out.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    batches: tuple[int, ...] = (1,)
    ratio: float = 0.75
    rounds: int = 5
    new_tokens: int = 16
    longest: int = 65_536

    def check(self) -> None:
        """Raise SettingError for the first wrong field."""
        for field in ("lengths", "batches"):
            for number in getattr(self, field):
                least = 128 if field == "lengths" else 1  # SnapKV's window is 64
                if number < least:
                    raise SettingError(field, number, f"at least {least}", "")
        if not 0 < self.ratio < 1:
            raise SettingError("ratio", self.ratio, "a number between 0 and 1", "")
        for field in ("rounds", "new_tokens"):
            if getattr(self, field) < 1:
                raise SettingError(field, getattr(self, field), "at least 1", "")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: SpeedPlan,
    presses: dict[str, Callable[[float], BasePress]] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Row]:
    """
    Measure all rows of a plan.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase or None
        Needed for KVzip, which is left out without it.
    plan : SpeedPlan
    presses : dict, optional
        Name -> function of the ratio. Default: ours and those of kvpress. The trained press is left out if the package
        has no routers for the model.
    """
    plan.check()
    presses = dict(presses or OURS | THEIRS)
    if shipped_routers(language_model(model).layers[0].self_attn) is None:
        presses.pop(TRAINED, None)
        presses.pop(MIXED, None)
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    settings = [(length, batch) for length in plan.lengths for batch in plan.batches if length * batch <= plan.longest]
    for length, _ in settings:
        if length + plan.new_tokens > limit:
            raise SettingError("lengths", length, f"at most {limit - plan.new_tokens}, what the model reads", "")
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for done, (length, batch) in enumerate(settings):
        progress(done, len(settings))
        input_ids = torch.randint(0, vocabulary, (batch, length), generator=generator).to(model.device)
        rows += prefill_rows(model, tokenizer, input_ids, plan.ratio, plan.rounds, presses)
        rows += decode_rows(model, input_ids, MoERouterPress, plan.new_tokens, plan.rounds)
    progress(len(settings), len(settings))
    return rows
