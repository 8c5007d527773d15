"""Needles in a haystack: RULER's single, multi-key, multi-value and multi-query retrieval (arXiv 2404.06654)."""

from __future__ import annotations

from itertools import cycle
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, hide, swept_depth
from kvpress_moe.benchmark.tasks.texts import sentences
from kvpress_moe.benchmark.tasks.vocabulary import keys

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)


def needle(
    random: Random,
    count_tokens: CountTokens,
    length: int,
    index: int,
    split: str,
    *,
    noise: bool = False,
    n_keys: int = 1,
    n_values: int = 1,
    n_asked: int = 1,
) -> dict[str, Any]:
    """
    Sentences that give ``n_values`` numbers to each of ``n_keys`` names. The question asks for ``n_asked`` names.

    The first needle of the first asked name is at the depth of :func:`swept_depth`, all others at random depths.
    """
    check_room("needles", length, 120 + 30 * n_keys * n_values)
    names = random.sample(keys(split), n_keys)
    values = {name: [str(random.randrange(10**6, 10**7)) for _ in range(n_values)] for name in names}
    asked = names[:n_asked]
    depth = swept_depth(index)
    facts = []
    for name in names:
        for number in range(n_values):
            swept = name == names[0] and number == 0
            text = f"One of the special magic numbers for {name} is: {values[name][number]}."
            facts.append((depth if swept else random.random(), text))
    room = length - count_tokens(_OPENING) - sum(count_tokens(" " + text) for _, text in facts) - 4
    filler = cycle(NOISE) if noise else cycle_sentences(random, sentences(split))
    body = " ".join(hide(fill(filler, room, count_tokens), facts))

    wanted = [value for name in asked for value in values[name]]
    if len(wanted) == 1:
        question = f"What is the special magic number for {asked[0]} mentioned in the provided text?"
        prefix = f"The special magic number for {asked[0]} mentioned in the provided text is"
        answer = f" {wanted[0]}"
    else:
        listed = enumeration(asked)
        wanted.sort(key=body.index) if n_asked == 1 else None
        question = f"What are all the special magic numbers for {listed} mentioned in the provided text?"
        prefix = f"The special magic numbers for {listed} mentioned in the provided text are:\n\n*"
        answer = bullets(wanted)
    return {
        "context": _OPENING + body,
        "question": question,
        "answer_prefix": prefix,
        "answer": answer,
        "references": tuple(wanted),
        "metric": "exact" if len(wanted) == 1 else "f1",
        "depth": depth,
    }


def bullets(items: list[str]) -> str:
    """A list as chat models write it, after its first bullet. The embedded model does so even if asked for one line."""
    return " " + "\n* ".join(items)


def enumeration(items: list[str]) -> str:
    """``a``, ``a, and b``, ``a, b, and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]
