"""Task scores: what share of the right answer was given."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from kvpress_moe.benchmark.cache_eval import Answer
from kvpress_moe.benchmark.tasks.sample import Sample

_SEPARATORS = re.compile(r"\s*(?:,|;|\n|\band\b)\s*")


def score(sample: Sample, answer: Answer, text: str | None) -> float:
    """
    Score an answer between 0 and 1.

    "exact": 1 if greedy decoding gives the right answer, token for token. The model is given the beginning of the
    answer, as in RULER. "f1": F1 of the references in the decoded text. "any": the best F1 of words with any of the
    references (as SQuAD and LongBench, arXiv 2308.14508, score short answers). "tokens": share of the right tokens that
    are the most likely ones.
    """
    if sample.metric == "exact":
        return float(answer.greedy.all())
    if sample.metric == "tokens":
        return answer.greedy.float().mean().item()
    if sample.metric == "any":
        return max(word_f1(text or "", reference) for reference in sample.references)
    return f1(text or "", sample.references)


def f1(text: str, references: Sequence[str]) -> float:
    """
    F1 of the items of an enumeration ("a, b, and c") or of a bulleted list, up to the first blank line.

    Items are compared without case and outer punctuation; a repeated item counts as wrong.
    """
    listed = text.strip().split("\n\n")[0]
    items = [normalised(item) for item in _SEPARATORS.split(listed)]
    items = [item for item in items if item]
    wanted = {normalised(reference) for reference in references}
    right = len(wanted & set(items))
    return 2 * right / (len(items) + len(wanted)) if right else 0.0


def word_f1(text: str, reference: str) -> float:
    """F1 of the words of an answer's first line. Each word counts as often as it occurs; articles are left out."""
    given, wanted = (Counter(_words(part)) for part in (text.strip().split("\n")[0], reference))
    right = (given & wanted).total()
    return 2 * right / (given.total() + wanted.total()) if right else 0.0


def _words(text: str) -> list[str]:
    words = (normalised(word) for word in text.split())
    return [word for word in words if word and word not in ("a", "an", "the")]


def normalised(item: str) -> str:
    """An item in lower case, without punctuation or spaces around it."""
    return item.strip(" \t.:!?\"'`()[]*-").casefold()
