"""Records or sentences, a few of which say the same of somebody; the question is how many."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import kvpress_moe.benchmark.tasks.vocabulary as words
from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, hide
from kvpress_moe.benchmark.tasks.texts import sentences
from kvpress_moe.benchmark.tasks.wording import asked, opening, prefix

_OPENINGS = (
    "Read the following carefully. I will ask how often something occurs.",
    "Here are some notes about a group of people.",
    "The following was collected by a survey.",
)


class Trait(NamedTuple):
    """What people have in common: its name in records, kind of values, statements, who is counted."""

    name: str
    value: str
    statements: tuple[str, ...]
    counted: str


TRAITS = (
    Trait("town", "city", ("{s} lives in {v}.", "The home of {s} is in {v}."), "people live in {v}"),
    Trait("course", "course", ("{s} takes part in the {v} course.",), "people take part in the {v} course"),
    Trait("instrument", "instrument", ("{s} plays the {v}.", "The {v} is played by {s}."), "people play the {v}"),
    Trait("meal", "dish", ("{s} ordered the {v}.", "The {v} is for {s}."), "people ordered the {v}"),
    Trait("jersey", "colour", ("{s} has a {v} jersey.", "The jersey of {s} is {v}."), "people have a {v} jersey"),
    Trait("language", "language", ("{s} speaks {v}.", "{v} is spoken by {s}."), "people speak {v}"),
    Trait("employer", "firm", ("{s} works for {v}.", "{s} is employed by {v}."), "people work for {v}"),
)
ROWS = ("{s}, {t} {v}, room {n}", "- {s} ({t}: {v}; room {n})", "name={s} {t}={v} room={n}", "{s} | {v} | {n}")


def counting(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """
    Two to six people have a value of a trait; all others have other values.

    In half of the samples up to twenty sentences are hidden in prose. In the others records fill the context.
    """
    check_room("counting", length, 224)
    trait = random.choice(TRAITS)
    n_right = random.randint(2, 6)
    value, *others = values(random, split, trait.value)
    start = opening(random, _OPENINGS)
    names = words.many_people(random, split, length // 6)
    matching, rest = names[:n_right], names[n_right:]
    if random.random() < 0.5:
        n_rest = random.randint(2, max(2, min(14, length // 48 - n_right)))
        pairs = [(name, value) for name in matching] + [(name, random.choice(others)) for name in rest[:n_rest]]
        said = [random.choice(trait.statements).format(s=name, v=given) for name, given in pairs]
        hidden = [(random.random(), text[0].upper() + text[1:]) for text in said]
        room = length - count_tokens(start) - sum(count_tokens(" " + text) for text in said) - 4
        body = " ".join(hide(fill(cycle_sentences(random, sentences(split)), room, count_tokens, misses=40), hidden))
    else:
        row = random.choice((*ROWS, *trait.statements))

        def record(name: str, given: str) -> str:
            text = row.format(s=name, v=given, t=trait.name, n=random.randrange(100, 1000))
            return text[0].upper() + text[1:] if row in trait.statements else text

        right = [record(name, value) for name in matching]
        room = length - count_tokens(start) - sum(count_tokens("\n" + text) for text in right) - 12
        wrong = fill((record(name, random.choice(others)) for name in rest), room, count_tokens, joint="\n")
        mixed = right + wrong
        random.shuffle(mixed)
        head = f"Name | {trait.name.capitalize()} | Room\n" if row == ROWS[-1] else ""
        body = head + "\n".join(mixed)
    counted = trait.counted.format(v=value)
    begin = random.choice((f"The number of people who {counted.removeprefix('people ')} is", "The number is"))
    return {
        "context": start + body,
        "question": asked(random, f"How many {counted}?", "text"),
        "answer_prefix": prefix(random, begin),
        "answer": f" {n_right}",
        "references": (str(n_right),),
        "metric": "exact",
    }


def values(random: Random, split: str, kind: str) -> list[str]:
    """Four to eight different values of a kind."""
    found: list[str] = []
    n = random.randint(4, 8)
    while len(found) < n:
        value = random.choice(words.courses(split)) if kind == "course" else KINDS[kind](random, split)
        if value not in found:
            found.append(value)
    return found
