"""Profiles of people, firms and places: sentences of documents, each with a question about it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.wording import capitalised


@dataclass(frozen=True)
class Detail:
    """A relation: as in ``Family``, but statements may call the subject ``{p}``, a short form of its name."""

    value: str
    statements: tuple[str, ...]
    question: str
    prefix: str


PERSON = (
    Detail(
        "city",
        (
            "{p} was born in {v} as the second of three children.",
            "Born in {v}, {p} grew up by the river.",
            "The life of {p} began in {v}, in the flat above a shop.",
        ),
        "Where was {s} born?",
        "{s} was born in",
    ),
    Detail(
        "recent",
        (
            "{p} finished school in {v}.",
            "School ended for {p} in {v}, with a prize for mathematics.",
            "{p} left school in {v} without much regret.",
        ),
        "When did {s} finish school?",
        "{s} finished school in",
    ),
    Detail(
        "firm",
        ("The first employer of {p} was {v}.", "{p} began a career as an apprentice at {v}."),
        "Who was the first employer of {s}?",
        "The first employer of {s} was",
    ),
    Detail(
        "person",
        ("{p} is married to {v}.", "{p} and {v} married young.", "The marriage of {p} and {v} has been a happy one."),
        "Who is {s} married to?",
        "{s} is married to",
    ),
    Detail(
        "instrument",
        ("In the evenings {p} plays the {v}.", "{p} also plays the {v}, and has done so in several bands."),
        "Which instrument does {s} play?",
        "{s} plays the",
    ),
    Detail(
        "language",
        ("Besides English, {p} speaks {v}.", "{p} translates poems from {v}."),
        "Which language besides English does {s} know?",
        "Besides English, {s} knows",
    ),
    Detail(
        "street",
        ("Today {p} lives in a narrow house in {v}.", "For some years now, {p} has been living in {v}."),
        "In which street does {s} live today?",
        "Today {s} lives in",
    ),
    Detail(
        "novel",
        ("{p} is best known for {v}.", "The greatest success of {p} is {v}, which was translated into many languages."),
        "What is {s} best known for?",
        "{s} is best known for",
    ),
)
FIRM = (
    Detail(
        "year",
        (
            "{s} was founded in {v}.",
            "The story of {s} began in {v} with a small loan.",
            "Since {v}, {s} has been a name that customers trust.",
        ),
        "When was {s} founded?",
        "{s} was founded in",
    ),
    Detail(
        "person",
        ("Its founder was {v}, who had studied abroad.", "The business was started by {v} in a shed."),
        "Who founded {s}?",
        "{s} was founded by",
    ),
    Detail(
        "city",
        ("The headquarters are in {v}.", "The company is managed from an office in {v}."),
        "Where are the headquarters of {s}?",
        "The headquarters of {s} are in",
    ),
    Detail(
        "extension",
        (
            "It employs {v} people.",
            "There are {v} employees, most of them engineers.",
            "The number of employees has risen to {v}.",
        ),
        "How many people work for {s}?",
        "The number of people who work for {s} is",
    ),
    Detail(
        "colour",
        ("The lettering of the logo is {v}.", "All of its vans are painted {v}."),
        "Which colour is typical of {s}?",
        "The colour that is typical of {s} is",
    ),
    Detail(
        "firm",
        ("Its main competitor is {v}.", "For years it has been fighting {v} for customers."),
        "Which company is the competitor of {s}?",
        "The competitor of {s} is",
    ),
)
PLACE = (
    Detail(
        "year",
        ("{s} became a town in {v}.", "{s} is a small place that became a town in {v}."),
        "In which year did {s} become a town?",
        "{s} became a town in",
    ),
    Detail(
        "person",
        ("The mayor is {v}.", "Since the last election {v} has been in charge of the town hall."),
        "Who is the mayor of {s}?",
        "The mayor of {s} is",
    ),
    Detail(
        "dish",
        ("Visitors come for the local speciality, {v}.", "In its restaurants one should try the {v}."),
        "Which dish is the speciality of {s}?",
        "The speciality of {s} is",
    ),
    Detail(
        "extension",
        ("Some {v} people live there.", "At the last count it had {v} inhabitants."),
        "How many inhabitants does {s} have?",
        "The number of inhabitants of {s} is",
    ),
    Detail(
        "street",
        ("The weekly market is held in {v}.", "Every Saturday there is a market in {v}."),
        "In which street is the market of {s}?",
        "The market of {s} is held in",
    ),
    Detail(
        "firm",
        ("The largest employer is {v}.", "Most people work for {v}, on the edge of town."),
        "Which company is the largest employer in {s}?",
        "The largest employer in {s} is",
    ),
)
PROFILES = {"person": PERSON, "firm": FIRM, "city": PLACE}


def described(random: Random, split: str, kind: str, name: str, n: int) -> list[tuple[str, str, str, str]]:
    """
    ``n`` sentences about a subject, each with its question, the beginning of the answer, and the value.

    The first one names the subject.
    """
    details = PROFILES[kind]
    made: list[tuple[str, str, str, str]] = []
    values: set[str] = {name}
    others = random.sample(range(1, len(details)), n - 1)
    for place in (0, *others):
        detail = details[place]
        value = KINDS[detail.value](random, split)
        while value in values:
            value = KINDS[detail.value](random, split)
        values.add(value)
        short = name if not made or kind != "person" else random.choice((name.split()[-1], name))
        statement = random.choice(detail.statements)
        made.append(
            (
                capitalised(statement.format(s=name, p=short, v=value)),
                detail.question.format(s=name),
                capitalised(detail.prefix.format(s=name)),
                value,
            )
        )
    return made
