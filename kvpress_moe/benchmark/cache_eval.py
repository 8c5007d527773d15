"""Cache evaluation: run one question over many compressed caches and compare the answers with the full cache's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.benchmark.byte_strategies import ELEMENT_SIZE, decode_all
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.selections import Kept, Selections
from kvpress_moe.cache import RaggedCache, RaggedLayer
from kvpress_moe.cache.masks import WholeSlidingLayer
from kvpress_moe.model.attention import apply_rope, causal_logits
from kvpress_moe.model.attention_view import AttentionView
from kvpress_moe.model.hooks import hooked
from kvpress_moe.model.layers import Attention, full_attentions
from kvpress_moe.model.transformers_api import crop, with_cache

BATCH_BYTES = 2**30  # of keys and values in one batch of caches


@dataclass
class Reference:
    """
    The answer of the full cache.

    Attributes
    ----------
    logits : Tensor, shape (A, V)
        Logits at each token of the right answer.
    mass : Tensor, shape (L, H, S)
        Attention that question and answer pay to each pair of the layers with full attention, summed over their tokens
        and the head's query heads.
    peak : Tensor, shape (L, H, S)
        The largest attention that any of these queries pays.
    """

    logits: Tensor
    mass: Tensor
    peak: Tensor


@dataclass
class Answer:
    """
    The answer of one cache.

    Attributes
    ----------
    nll : float
        Mean negative log-likelihood of the right answer's tokens, teacher-forced, in nats.
    kl : float
        Mean KL divergence of its next-token distributions from the full cache's, at the same tokens, in nats.
    greedy : Tensor, shape (A,), bool
        Which tokens of the right answer are the most likely ones, given the right tokens before them. If all are,
        greedy decoding gives the right answer.
    hit_rate : float
        Share of the attention of question and answer (measured on the full cache) that falls on kept pairs.
    n_pairs, n_bytes : int
        Counted in the cache that answered. Bytes are those of a 16-bit cache: two for each number that is not coded.
    written : list of int or None
        Greedily decoded tokens, if requested.
    """

    nll: float
    kl: float
    greedy: Tensor
    hit_rate: float
    n_pairs: int
    n_bytes: int
    written: list[int] | None = None


@torch.no_grad()
def evaluate_full_cache(model: PreTrainedModel, cache: DynamicCache, prompt: Prompt) -> Reference:
    """Evaluate the full cache (batch 1). Afterwards the cache is as before."""
    n_read = cache.get_seq_length()
    masses: list[Tensor] = []
    peaks: list[Tensor] = []

    def observe(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        view = AttentionView(module, kwargs["hidden_states"])
        queries = get_prerope_query_states(view, kwargs["hidden_states"])
        queries = apply_rope(queries, *kwargs["position_embeddings"])
        layer = cache.layers[module.layer_idx]
        attention = causal_logits(module, queries, layer.keys).softmax(-1)[..., :n_read]
        of_head = attention.unflatten(1, (layer.keys.shape[1], -1)).flatten(2, 3)[0]  # (H, G·Q, S)
        masses.append(of_head.sum(1))
        peaks.append(of_head.amax(1))

    try:
        with hooked(full_attentions(model), observe):
            logits = read(model, cache, prompt, n_read)[0]
    finally:
        crop(cache, n_read)
    return Reference(logits, torch.stack(masses), torch.stack(peaks))


def read(
    model: PreTrainedModel, cache: DynamicCache, prompt: Prompt, n_read: int, offsets: Tensor | None = None
) -> Tensor:
    """Run question and answer over a cache. Returns the logits (B, A, V) of the answer's tokens."""
    tokens = torch.cat((prompt.question, prompt.answer[:, :-1]), dim=1).to(model.device)
    n_rows = 1 if offsets is None else len(offsets)
    return step(model, cache, tokens.expand(n_rows, -1), n_read, offsets, prompt.answer.shape[1])


def step(
    model: PreTrainedModel, cache: DynamicCache, tokens: Tensor, start: int, offsets: Tensor | None, n_logits: int
) -> Tensor:
    """A forward pass over tokens (B, T), at cache positions from ``start`` on. ``offsets`` (B) shift positions."""
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    position_ids = positions[None].expand(len(tokens), -1)
    output = model(
        input_ids=tokens,
        **with_cache(cache, positions),
        position_ids=position_ids if offsets is None else position_ids + offsets[:, None],
        logits_to_keep=n_logits,
    )
    logits: Tensor = output.logits
    return logits


def batches(
    kept: Sequence[Kept], bytes_per_pair: int, bytes_beside: int = 0, limit: int = BATCH_BYTES
) -> Iterator[list[int]]:
    """Batches of cache indices: at most ``limit`` bytes (pairs, and ``bytes_beside`` per cache), at most 48 caches."""
    batch: list[int] = []
    size = 0
    for index, one in enumerate(kept):
        n_bytes = one.n_pairs * bytes_per_pair + bytes_beside
        if batch and (size + n_bytes > limit or len(batch) == 48):
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += n_bytes
    if batch:
        yield batch


def stack(selections: Selections, kept: Sequence[Kept]) -> RaggedCache:
    """One ragged cache. Each row is what one method kept of the full cache; sliding-window layers are complete."""
    ragged = RaggedCache()
    layers: list[Any] = selections.cache.layers
    for layer_idx, layer in enumerate(layers):
        if layer_idx in selections.layers:
            ragged.layers.append(_stack_layer(layer, selections.layers.index(layer_idx), kept))
        else:
            whole: Any = WholeSlidingLayer()  # type: ignore[no-untyped-call]
            whole.update(*(pairs.expand(len(kept), -1, -1, -1) for pairs in (layer.keys, layer.values)))
            ragged.layers.append(whole)
    return ragged


def _stack_layer(layer: Any, number: int, kept: Sequence[Kept]) -> RaggedLayer:
    keys, values, lengths = [], [], []
    decoded = iter(decode_all([one.coded for one in kept if one.coded], number, layer.keys, layer.values))
    for one in kept:
        if one.altered is None:
            mask = one.mask[number]
            all_keys, all_values = next(decoded) if one.coded else (layer.keys[0], layer.values[0])
            keys.append(all_keys[mask])
            values.append(all_values[mask])
            lengths.append(mask.sum(-1).tolist())
        else:
            keys.extend(one.altered[number][0])
            values.extend(one.altered[number][1])
            lengths.append([len(head) for head in one.altered[number][0]])
    return RaggedLayer(torch.cat(keys), torch.cat(values), lengths, layer.get_seq_length())


@torch.no_grad()
def evaluate_caches(
    model: PreTrainedModel,
    selections: Selections,
    prompt: Prompt,
    reference: Reference,
    kept: Sequence[Kept],
    write: int = 0,
    ended: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[Answer]:
    """
    Evaluate compressed caches, in batches of at most ``BATCH_BYTES``.

    Parameters
    ----------
    model : PreTrainedModel
    selections : Selections
        With the prompt's full cache.
    prompt : Prompt
    reference : Reference
        The full cache's answer to the same prompt.
    kept : sequence of Kept
    write : int, default=0
        Decode greedily up to this many tokens. If the right answer is the most likely one, it is not decoded again.
    ended : callable
        Whether the tokens decoded so far are a complete answer. Later tokens would not count.

    Returns
    -------
    list of Answer
        In the order of ``kept``.
    """
    layers: list[Any] = selections.cache.layers
    bytes_per_pair = 2 * layers[0].keys.shape[-1] * layers[0].keys.element_size()
    whole = [layer for layer_idx, layer in enumerate(layers) if layer_idx not in selections.layers]
    bytes_beside = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole)
    log_reference = reference.logits.float().log_softmax(-1)
    right = prompt.answer[0].to(reference.logits.device)
    n_read = selections.cache.get_seq_length()
    likely = log_reference.exp()
    order = sorted(range(len(kept)), key=lambda index: kept[index].n_pairs)  # a batch has rows of similar length
    answers: list[Answer] = []
    for batch in batches([kept[index] for index in order], bytes_per_pair, bytes_beside):
        rows = [kept[order[index]] for index in batch]
        cache = stack(selections, rows)
        n_bytes = [_row_bytes(cache, row) if one.n_bytes is None else one.n_bytes for row, one in enumerate(rows)]
        offsets = torch.tensor([row.next_position - n_read for row in rows], device=right.device)
        logits = read(model, cache, prompt, n_read, offsets)
        for row, own, counted in zip(rows, logits, n_bytes, strict=True):
            log_own = own.float().log_softmax(-1)
            nll = -log_own.gather(-1, right[:, None]).mean()
            kl = (likely * (log_reference - log_own)).sum(-1).mean()
            greedy = own.argmax(-1) == right
            rate = hit_rate(row, reference.mass)
            answers.append(Answer(nll.item(), kl.clamp(min=0).item(), greedy.cpu(), rate, row.n_pairs, counted))
        if write:
            write_out(model, cache, prompt, logits.argmax(-1), answers[-len(rows) :], offsets, n_read, write, ended)
    return [answers[at] for at in sorted(range(len(order)), key=order.__getitem__)]


def _row_bytes(cache: RaggedCache, row: int) -> int:
    """Bytes of one row's keys and values in ragged layers, those that presses compress, if they had 16 bits."""
    layers: list[Any] = [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]
    per_pair = [2 * layer.flat_keys.shape[-1] * ELEMENT_SIZE for layer in layers]
    return sum(sum(layer.lengths[row]) * size for layer, size in zip(layers, per_pair, strict=True))


def hit_rate(kept: Kept, mass: Tensor) -> float:
    """Share of the mass (L, H, S) on kept pairs; NaN if it is unknown which pairs were kept."""
    if not kept.mask:
        return float("nan")
    return (sum((mass[i] * mask).sum() for i, mask in enumerate(kept.mask)) / mass.sum()).item()


def write_out(
    model: PreTrainedModel,
    cache: RaggedCache,
    prompt: Prompt,
    likeliest: Tensor,
    answers: Sequence[Answer],
    offsets: Tensor,
    n_read: int,
    limit: int,
    ended: Callable[[list[int]], bool],
) -> None:
    """
    Decode greedily and write the tokens into the answers.

    The teacher-forced pass already gives all tokens up to the first one that differs from the right answer. Only rows
    that differ are decoded further.
    """
    right = prompt.answer[0].tolist()
    n_question = prompt.question.shape[1]
    departs = [len(right) if bool(a.greedy.all()) else int(a.greedy.int().argmin()) for a in answers]
    going = [row for row, at in enumerate(departs) if at < len(right)]
    for row, answer in enumerate(answers):
        answer.written = right[: departs[row]]
    if not going:
        return
    start = min(departs[row] for row in going)
    written = {row: right[:start] for row in going}
    tokens = {row: int(likeliest[row, start]) for row in going}
    crop(cache, n_read + n_question + start)
    rows = list(range(len(answers)))  # the rows that the cache holds
    for position in range(start, limit):
        for row in going:
            written[row].append(tokens[row])
        going = [row for row in going if not ended(written[row])]
        if not going or position == limit - 1:
            break
        if len(going) <= 0.75 * len(rows):  # removing rows copies the others
            cache.batch_select_indices(torch.tensor([rows.index(row) for row in going]))
            rows = going
        last = torch.tensor([tokens.get(row, 0) for row in rows], device=offsets.device)
        logits = step(model, cache, last[:, None], n_read + n_question + position, offsets[rows], 1)
        tokens |= dict(zip(rows, logits[:, -1].argmax(-1).tolist(), strict=True))
    for row, tokens_written in written.items():
        answers[row].written = tokens_written
