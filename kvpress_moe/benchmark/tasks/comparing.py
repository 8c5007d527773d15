"""Numbers of several subjects, hidden in prose; the question is whose is the largest or the smallest."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, cycle_sentences, fill, hide, swept_depth
from kvpress_moe.benchmark.tasks.texts import sentences
from kvpress_moe.benchmark.tasks.wording import asked, capitalised, opening, prefix

_OPENINGS = (
    "Read the text below and keep the numbers in mind.",
    "The following text mentions several figures. I will ask you to compare some of them.",
    "Here is a text. Afterwards there is a question about it.",
)


class Measure(NamedTuple):
    """What is compared. ``{s}`` is a subject, ``{n}`` its number; of two words the first is for two subjects."""

    subject: str
    numbers: range
    statements: tuple[str, ...]
    question: str
    more: tuple[str, str]
    less: tuple[str, str]


MEASURES = (
    Measure(
        "person",
        range(19, 90, 3),
        ("{s} is {n} years old.", "{s} turned {n} this year.", "This spring, {s} celebrated birthday number {n}."),
        "Who is {how}",
        ("older", "the oldest"),
        ("younger", "the youngest"),
    ),
    Measure(
        "person",
        range(148, 206, 3),
        ("{s} is {n} cm tall.", "{s} has a height of {n} cm.", "According to the nurse, {s} measures {n} cm."),
        "Who is {how}",
        ("taller", "the tallest"),
        ("shorter", "the shortest"),
    ),
    Measure(
        "person",
        range(172, 299, 7),
        ("{s} finished the marathon in {n} minutes.", "{s} needed {n} minutes for the marathon."),
        "Who was {how} in the marathon",
        ("slower", "the slowest"),
        ("faster", "the fastest"),
    ),
    Measure(
        "person",
        range(12, 99, 4),
        ("{s} won {n} points in the quiz.", "In the quiz, {s} got {n} points."),
        "Who got {how} points in the quiz",
        ("more", "the most"),
        ("fewer", "the fewest"),
    ),
    Measure(
        "firm",
        range(1820, 2015, 9),
        ("{s} was founded in {n}.", "{s} has existed since {n}.", "The first factory of {s} opened its gates in {n}."),
        "Which company was founded {how}",
        ("later", "last"),
        ("earlier", "first"),
    ),
    Measure(
        "firm",
        range(35, 980, 31),
        ("{s} has {n} employees.", "{s} employs {n} people.", "There are {n} people on the payroll of {s}."),
        "Which company has {how} employees",
        ("more", "the most"),
        ("fewer", "the fewest"),
    ),
    Measure(
        "thing",
        range(8, 980, 23),
        ("{s} costs {n} dollars.", "The price of {s} is {n} dollars.", "Somebody sells {s} for {n} dollars."),
        "Which is {how}",
        ("more expensive", "the most expensive"),
        ("cheaper", "the cheapest"),
    ),
    Measure(
        "thing",
        range(120, 990, 35),
        ("{s} weighs {n} grams.", "The weight of {s} is {n} grams.", "On the scales, {s} came to {n} grams."),
        "Which is {how}",
        ("heavier", "the heaviest"),
        ("lighter", "the lightest"),
    ),
    Measure(
        "city",
        range(1100, 9900, 170),
        ("{s} has {n} inhabitants.", "The population of {s} is {n}.", "Some {n} people live in {s}."),
        "Which town has {how} inhabitants",
        ("more", "the most"),
        ("fewer", "the fewest"),
    ),
    Measure(
        "city",
        range(14, 480, 13),
        ("From {s} it is {n} km to the coast.", "The road from {s} to the sea is {n} km long."),
        "Which town is {how} the sea",
        ("farther from", "the farthest from"),
        ("closer to", "the closest to"),
    ),
)


def comparing(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """
    Four to twelve numbers between the sentences of prose. Two or three of the same measure are compared.

    No subject has two numbers. The right one is at the depth of
    :func:`kvpress_moe.benchmark.tasks.filling.swept_depth`.
    """
    check_room("comparisons", length, 224)
    measure = random.choice(MEASURES)
    n_asked = random.choice((2, 2, 3))
    n = random.randint(4, max(4, min(12, length // 64)))
    measures = [measure] * n_asked + [random.choice((measure, *MEASURES)) for _ in range(n - n_asked)]
    subjects: list[str] = []
    while len(subjects) < n:
        subject = KINDS[measures[len(subjects)].subject](random, split)
        if subject not in subjects:
            subjects.append(subject)
    numbers = [*random.sample(measure.numbers, n_asked), *(random.choice(kind.numbers) for kind in measures[n_asked:])]
    choose, how = random.choice(((max, measure.more), (min, measure.less)))
    right = numbers.index(choose(numbers[:n_asked]))
    depth = swept_depth(index)
    hidden = [
        (
            depth if place == right else random.random(),
            capitalised(random.choice(kind.statements).format(s=subject, n=number)),
        )
        for place, (kind, subject, number) in enumerate(zip(measures, subjects, numbers, strict=True))
    ]
    start = opening(random, _OPENINGS)
    room = length - count_tokens(start) - sum(count_tokens(" " + text) for _, text in hidden) - 4
    prose = fill(cycle_sentences(random, sentences(split)), room, count_tokens, misses=40)
    word = how[n_asked > 2]
    listed = random.sample(subjects[:n_asked], n_asked)
    names = " or ".join(listed) if n_asked == 2 else f"{listed[0]}, {listed[1]} or {listed[2]}"
    answer = subjects[right]
    question = random.choice(("{q}: {names}?", "{q}, {names}?")).format(
        q=measure.question.format(how=word), names=names
    )
    begin = completed(measure.question.format(how=word))
    return {
        "context": start + " ".join(hide(prose, hidden)),
        "question": asked(random, question, "text"),
        "answer_prefix": prefix(random, begin),
        "answer": f" {answer}",
        "references": (answer.removeprefix("the "),),
        "metric": "exact",
        "depth": depth,
    }


def completed(question: str) -> str:
    """Beginning of the answer: ``Who is older`` becomes ``The one who is older is``."""
    for asks, says in (("Who", "The one who"), ("Which is", "The one that is"), ("Which company", "The company that")):
        if question.startswith(asks):
            return f"{says}{question.removeprefix(asks)} is"
    return f"The town that{question.removeprefix('Which town')} is"
