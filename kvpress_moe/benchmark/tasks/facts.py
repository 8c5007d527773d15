"""Facts in natural sentences, hidden in prose; one or two are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.fact_families import FAMILIES, KINDS, Family
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, hide, swept_depth
from kvpress_moe.benchmark.tasks.needles import bullets
from kvpress_moe.benchmark.tasks.texts import sentences
from kvpress_moe.benchmark.tasks.wording import asked, capitalised, opening, prefix

_OPENINGS = (
    "Read the text below. There will be a question about it.",
    "Here is a text with some facts in it. Remember them.",
    "Please read this carefully; you will need the details later.",
    "The following pages come from a collection of notes.",
)
_OPENINGS_OF_TWO = ("Answer:", "The two answers, in this order, are", "Both answers:\n\n*", "The answers are:\n\n*")


@dataclass(frozen=True)
class Fact:
    """A family with its subject and value."""

    family: Family
    subject: str
    value: str

    def said(self, random: Random) -> str:
        return capitalised(random.choice(self.family.statements).format(s=self.subject, v=self.value))

    def question(self, random: Random) -> str:
        return random.choice(self.family.questions).format(s=self.subject)

    def prefix(self, random: Random) -> str:
        return capitalised(random.choice(self.family.prefixes).format(s=self.subject))


def facts(
    random: Random, count_tokens: CountTokens, length: int, index: int, split: str, *, n_asked: int = 1
) -> dict[str, Any]:
    """
    Four to twelve facts between the sentences of prose; ``n_asked`` of them are asked for.

    Some of the others are of the same family, or about the same person. The first asked fact is at the depth of
    :func:`kvpress_moe.benchmark.tasks.filling.swept_depth`, all others at random depths.
    """
    check_room("facts in prose", length, 224)
    drawn = draw(random, split, random.randint(4, max(4, min(12, length // 64))))
    depth = swept_depth(index)
    hidden = [(depth if fact is drawn[0] else random.random(), fact.said(random)) for fact in drawn]
    start = opening(random, _OPENINGS)
    room = length - count_tokens(start) - sum(count_tokens(" " + text) for _, text in hidden) - 4
    prose = fill(cycle_sentences(random, sentences(split)), room, count_tokens, misses=40)
    if n_asked == 1:
        question, begin = drawn[0].question(random), prefix(random, drawn[0].prefix(random))
    else:
        first, second = drawn[0].question(random), drawn[1].question(random)
        question = f"{first[:-1]}, and {second[0].lower()}{second[1:]}"
        begin = random.choice(_OPENINGS_OF_TWO)
    values = [fact.value for fact in drawn[:n_asked]]
    return {
        "context": start + " ".join(hide(prose, hidden)),
        "question": asked(random, question, "text"),
        "answer_prefix": begin,
        "answer": bullets(values) if begin.endswith("*") else " " + " and ".join(values),
        "references": tuple(values),
        "metric": "exact" if n_asked == 1 else "f1",
        "depth": depth,
    }


def draw(random: Random, split: str, n: int) -> list[Fact]:
    """Facts with different values; no two facts of a family have the same subject."""
    first = random.choice(FAMILIES)
    drawn: list[Fact] = []
    taken: set[str] = set()
    while len(drawn) < n:
        family = first if not drawn or random.random() < 0.3 else random.choice(FAMILIES)
        fact = Fact(family, KINDS[family.subject](random, split), KINDS[family.value](random, split))
        again = drawn and drawn[0].family.subject == family.subject == "person" and random.random() < 0.3
        if again and all(old.family != family or old.subject != drawn[0].subject for old in drawn):
            fact = Fact(family, drawn[0].subject, fact.value)
        elif fact.subject in taken:
            continue
        if fact.value not in taken and fact.value != fact.subject:
            drawn.append(fact)
            taken |= {fact.subject, fact.value}
    return drawn
