"""Sampling: a frozen model writes many texts at once, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.model.chat_template import cut_message
from kvpress_moe.model.end_tokens import end_tokens
from kvpress_moe.model.transformers_api import with_cache

MOST = 128


def request_ids(tokenizer: PreTrainedTokenizerBase, request: str, beginning: str = "", n_tokens: int = 0) -> list[int]:
    """
    Token ids of a request in the chat template, up to the answer's first token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    request : str
        If the tokenizer has no chat template, it is plain text that the model continues.
    beginning : str
        Beginning of the answer.
    n_tokens : int
        Smallest number of tokens. New lines are added to the request.
    """
    head, tail = request, beginning
    chat = bool(tokenizer.chat_template)
    if chat:
        head, tail = cut_message(tokenizer, request)
        tail += beginning
    before: list[int] = tokenizer(head, add_special_tokens=not chat).input_ids
    after: list[int] = tokenizer(tail, add_special_tokens=False).input_ids if tail else []
    new_line: list[int] = tokenizer("\n", add_special_tokens=False).input_ids[-1:]
    return before + new_line * (n_tokens - len(before) - len(after)) + after


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that the model continues, without its chat template."""
    ids: list[int] = tokenizer(text).input_ids
    return ids


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[int]],
    generator: torch.Generator,
    n_tokens: int,
    temperature: float,
    top_p: float = 0.95,
    is_complete: Callable[[str], bool] | None = None,
) -> list[str]:
    """
    What the model writes after each of these requests, sampled.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    requests : sequence of sequence of int
        Token ids, one batch. Requests of different lengths are padded on the left, which may take much longer.
    generator : torch.Generator
        On the CPU. No other random numbers are used.
    n_tokens : int
        Largest number of tokens of a text.
    temperature, top_p : float
        A token is drawn from the likeliest ones that have this share of the probability.
    is_complete : callable, optional
        Whether a text needs no more tokens.
    """
    ends = end_tokens(model, tokenizer)
    longest = max(map(len, requests))
    tokens = torch.tensor([[0] * (longest - len(request)) + list(request) for request in requests])
    mask = torch.tensor([[0] * (longest - len(request)) + [1] * len(request) for request in requests])
    is_padded = not bool(mask.all())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in requests]
    going = list(range(len(requests)))
    cache = DynamicCache()
    for _ in range(n_tokens):
        first = mask.shape[1] - tokens.shape[1]
        output = model(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device) if is_padded else None,
            position_ids=positions.to(model.device),
            logits_to_keep=1,
            **with_cache(cache, torch.arange(first, mask.shape[1], device=model.device)),
        )
        logits = output.logits[:, -1].float().cpu()
        for row in going:
            logits[row, repeating(written[row])] = -torch.inf
        drawn = draw(logits, generator, temperature, top_p)
        for row in list(going):
            token = int(drawn[row])
            if token not in ends:
                written[row].append(token)
            if token in ends or (is_complete is not None and is_complete(text_of(tokenizer, written[row]))):
                going.remove(row)
        if not going:
            break
        tokens = drawn[:, None]
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        positions = positions[:, -1:] + 1
    return [text_of(tokenizer, row) for row in written]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens, without special ones."""
    text: Any = tokenizer.decode(tokens, skip_special_tokens=True)
    return str(text)


def repeating(written: Sequence[int], n_tokens: int = 8) -> list[int]:
    """Tokens that would make the last ``n_tokens`` a repetition: small models fall into loops."""
    before = tuple(written[len(written) - n_tokens + 1 :])
    starts = range(len(written) - n_tokens + 1)
    return [written[start + n_tokens - 1] for start in starts if tuple(written[start : start + n_tokens - 1]) == before]


def draw(logits: Tensor, generator: torch.Generator, temperature: float, top_p: float) -> Tensor:
    """
    One token (B) for each row of logits (B, V), from the likeliest ones that have ``top_p`` of the probability.

    Only the ``MOST`` likeliest tokens are considered: sorting all of them takes as long as a small model.
    """
    chances = (logits / temperature).softmax(-1)
    likely, order = chances.topk(min(MOST, chances.shape[-1]), dim=-1)
    likely[likely.cumsum(-1) - likely >= top_p] = 0
    return order.gather(-1, torch.multinomial(likely, 1, generator=generator))[:, 0]
