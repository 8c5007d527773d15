"""Continuation tasks: real prose, real code, and a passage that is already in the context."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, swept_depth
from kvpress_moe.benchmark.tasks.texts import modules, running_text, sentences, source, topics

ANSWER_TOKENS = 48


def continuation(
    random: Random, count_tokens: CountTokens, length: int, index: int, split: str, *, code: bool = False
) -> dict[str, Any]:
    """A text cut in two: the context, and its real continuation."""
    check_room("continuations", length, 64)
    texts = [source(module) for module in modules(split)] if code else list(topics(split).values())
    text = running_text(random, texts, 8 * (length + ANSWER_TOKENS))
    context, rest = split_at(text, length, count_tokens)
    answer, _ = split_at(rest, ANSWER_TOKENS, count_tokens)
    return {
        "context": context,
        "question": "",
        "answer_prefix": "",
        "answer": answer,
        "references": (),
        "metric": "tokens",
        "chat": False,
    }


def split_at(text: str, n_tokens: int, count_tokens: CountTokens) -> tuple[str, str]:
    """Split a text after its longest start of at most ``n_tokens`` tokens that ends before a space or a new line."""
    low, high = 0, min(len(text), 8 * n_tokens)
    while high - low > 1:  # the number of tokens grows with the number of characters
        middle = (low + high) // 2
        if count_tokens(text[:middle]) <= n_tokens:
            low = middle
        else:
            high = middle
    cut = max(text.rfind(" ", 1, low + 1), text.rfind("\n", 1, low + 1))
    cut = cut if cut > 0 else low
    return text[:cut], text[cut:]


def copying(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Numbered passages of prose. One of them must be repeated word for word."""
    check_room("copying", length, 256)
    prose = cycle_sentences(random, sentences(split))

    def passages() -> Iterator[str]:
        number = 0
        while True:
            number += 1
            text = next(prose)
            while count_tokens(text) < min(60, length // 16):
                text += " " + next(prose)
            yield f"Passage {number}: {text}"

    kept = fill(passages(), length - 4, count_tokens, joint="\n\n")
    depth = swept_depth(index)
    number = int(depth * len(kept))
    texts = [passage.split(": ", 1)[1].split(" ") for passage in kept]
    words = texts[number]
    given = beginning(words, texts)
    answer, _ = split_at(" " + " ".join(words[given:]) + " ", ANSWER_TOKENS, count_tokens)
    return {
        "context": "\n\n".join(kept),
        "question": f"Repeat passage {number + 1} word for word.",
        "answer_prefix": " ".join(words[:given]),
        "answer": answer,
        "references": (),
        "metric": "tokens",
        "depth": depth,
    }


def beginning(words: list[str], others: list[list[str]]) -> int:
    """How many words of a passage the model is given: six, or more if another passage begins in the same way."""
    given = 6
    while given < len(words) - 6 and any(other[:given] == words[:given] and other != words for other in others):
        given += 1
    return given
