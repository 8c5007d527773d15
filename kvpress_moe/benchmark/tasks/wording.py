"""Wording that varies from sample to sample: openings, ways to ask, beginnings of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_PLAIN = ("Answer:", "Answer:", "The answer is", "The correct answer is")


def opening(random: Random, sentences: Sequence[str]) -> str:
    """One of the sentences and an empty line; nothing in a third of the cases."""
    return f"{random.choice(sentences)}\n\n" if random.random() < 2 / 3 else ""


def asked(random: Random, question: str, source: str) -> str:
    """The question, sometimes with a reference to its source ("text", "table")."""
    leads = ("", "", "", f"According to the {source} above, ", f"Based on the {source}, ")
    lead = random.choice(leads)
    return lead + question[0].lower() + question[1:] if lead else question


def prefix(random: Random, sentence: str) -> str:
    """Beginning of the answer: a sentence that it completes, or in two of five cases only ``Answer:`` or the like."""
    return sentence if random.random() < 0.6 else random.choice(_PLAIN)


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
