"""Frequent words: which words come up most often (RULER's common-word extraction, arXiv 2404.06654)."""

from __future__ import annotations

from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room
from kvpress_moe.benchmark.tasks.needles import bullets
from kvpress_moe.benchmark.tasks.vocabulary import nouns

_OPENING = "Below is a list of words. Memorize the words that appear most often.\n"


def frequent_words(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """A list in random order: three words are 28, 20 and 12 % of it; the other words are rare."""
    check_room("frequent words", length, 128)
    words = random.sample(nouns(split), min(len(nouns(split)), 23))
    common, rare = words[:3], words[3:]
    shares = dict(zip(common, (0.28, 0.2, 0.12), strict=True)) | dict.fromkeys(rare, 0.4 / len(rare))
    cost = sum(share * count_tokens(f" {word},") for word, share in shares.items())
    n_words = int((length - count_tokens(_OPENING) - 4) / cost)
    listed = [word for word in shares for _ in range(round(shares[word] * n_words))]
    random.shuffle(listed)
    while count_tokens(_OPENING + ", ".join(listed)) > length:
        listed = listed[: int(0.99 * len(listed))]
    return {
        "context": _OPENING + ", ".join(listed),
        "question": "What are the three most common words in the list above?",
        "answer_prefix": "The three most common words in the list are:\n\n*",
        "answer": bullets(common),
        "references": tuple(common),
        "metric": "f1",
    }
