"""Task scores: what share of the right answer was given."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvpress_moe.benchmark.asking import Answer
from kvpress_moe.benchmark.tasks.sample import Sample

_SEPARATORS = re.compile(r"\s*(?:,|;|\n|\band\b)\s*")


def score(sample: Sample, answer: Answer, text: str | None) -> float:
    """
    Score an answer between 0 and 1.

    "exact": 1 if greedy decoding writes the right answer, token for token (after the answer's beginning that RULER
    also gives). "f1": of the references in what was decoded. "tokens": share of the right tokens that are likeliest.
    """
    if sample.metric == "exact":
        return float(answer.greedy.all())
    if sample.metric == "tokens":
        return answer.greedy.float().mean().item()
    return f1(text or "", sample.references)


def f1(text: str, references: Sequence[str]) -> float:
    """
    F1 of the items of an enumeration ("a, b, and c") or of a bulleted list, up to the first blank line.

    Items are compared without case and outer punctuation; an item said twice counts as one that is wrong.
    """
    listed = text.strip().split("\n\n")[0]
    items = [normalised(item) for item in _SEPARATORS.split(listed)]
    items = [item for item in items if item]
    wanted = {normalised(reference) for reference in references}
    right = len(wanted & set(items))
    return 2 * right / (len(items) + len(wanted)) if right else 0.0


def normalised(item: str) -> str:
    """Without case and without punctuation or spaces around it."""
    return item.strip(" \t.:!?\"'`()[]*-").casefold()
