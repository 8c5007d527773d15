"""Gaps: a sentence of prose or a line of code is repeated, with some of its words left out."""

from __future__ import annotations

import keyword
import re
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.continuation import split_at
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, swept_depth
from kvpress_moe.benchmark.tasks.texts import modules, running_text, sentences, source
from kvpress_moe.benchmark.tasks.wording import opening, prefix

_GAP = "____"
_OPENINGS = (
    "Read this text closely.",
    "Here is a text. Later you will have to fill a gap in it.",
    "The following is taken from a longer document.",
)
_QUESTIONS = (
    "Fill in the gap in this {unit} of the text above: {gapped}",
    "Which words are missing here? {gapped}",
    "Complete the {unit} as it stands in the text: {gapped}",
    "What does {gap} stand for in the following {unit} of the text? {gapped}",
)


def cloze(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Prose in three of five samples, code in the others. The unit with the gap has no twin in the context."""
    check_room("gaps", length, 224)
    start = opening(random, _OPENINGS)
    room = length - count_tokens(start) - 4
    unit = "sentence" if random.random() < 0.6 else "line"
    depth = swept_depth(index)
    ways: list[tuple[str, str]] = []
    while not ways:  # some pieces of code have no line that is good for a gap
        body, units = (prose if unit == "sentence" else program)(random, room, count_tokens, split)
        for place in sorted(range(len(units)), key=lambda place: abs(place - depth * len(units))):
            ways = gaps(units[place].strip(), units, unit == "line")
            if ways:
                break
    gapped, answer = random.choice(ways)
    question = random.choice(_QUESTIONS).format(unit=unit, gap=_GAP, gapped=gapped)
    before = gapped.split(_GAP)[0].rstrip()
    begin = before if unit == "sentence" and len(before) > 30 else f"{_GAP} stands for"
    return {
        "context": start + body,
        "question": question,
        "answer_prefix": prefix(random, begin),
        "answer": f" {answer}",
        "references": (answer,),
        "metric": "exact",
        "depth": (place + 0.5) / len(units),
    }


def prose(random: Random, room: int, count_tokens: CountTokens, split: str) -> tuple[str, list[str]]:
    """A text and its sentences."""
    units = fill(cycle_sentences(random, sentences(split)), room, count_tokens, misses=40)
    return " ".join(units), units


def program(random: Random, room: int, count_tokens: CountTokens, split: str) -> tuple[str, list[str]]:
    """Code and its lines that are not cut off."""
    text = running_text(random, [source(module) for module in modules(split)], 8 * room)
    body, _ = split_at(text, room, count_tokens)
    return body, body.split("\n")[1:-1]


def gaps(text: str, units: list[str], code: bool) -> list[tuple[str, str]]:
    """
    Ways to leave out words of a unit: (unit with a gap, what was there).

    No other unit may fit the gapped one. Code loses a name, prose one word of five letters or more, or its last two to
    four words.
    """
    if not 30 <= len(text) <= 200:
        return []
    if code:
        if text[0] in "#\"'":
            return []
        spans = [found.span() for found in re.finditer(r"(?<!\w)[A-Za-z_]{4,}(?!\w)", text)]
        spans = [
            (a, b)
            for a, b in spans
            if not keyword.iskeyword(text[a:b]) and text[a:b] != "self" and (a == 0 or text[a - 1] in " (,=[")
        ]
    else:
        words = [found.span() for found in re.finditer(r"\S+", text.rstrip(".!?:"))]
        plain = [bool(re.fullmatch(r"[A-Za-z]+", text[a:b])) for a, b in words]
        spans = [(a, b) for (a, b), good in zip(words[3:], plain[3:], strict=True) if good and b - a >= 5]
        spans += [(words[-n][0], words[-1][1]) for n in (2, 3, 4) if len(words) > n + 4 and all(plain[-n:])]
    ways = [(f"{text[:a]}{_GAP}{text[b:]}", text[a:b]) for a, b in spans]
    others = {unit.strip() for unit in units} - {text}
    return [(gapped, answer) for gapped, answer in ways if not any(fits(gapped, other) for other in others)]


def fits(gapped: str, unit: str) -> bool:
    """Whether a unit could be the one with the gap."""
    before, after = gapped.split(_GAP)
    return len(unit) > len(before) + len(after) and unit.startswith(before) and unit.endswith(after)
