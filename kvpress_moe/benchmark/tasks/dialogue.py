"""A conversation of several people; what one of them has said or plans is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.small_talk import small_talk
from kvpress_moe.benchmark.tasks.vocabulary import first_names
from kvpress_moe.benchmark.tasks.wording import article, asked, opening, prefix

_OPENINGS = (
    "The following is a conversation between friends.",
    "Here is the transcript of a chat.",
    "Read this conversation. I will ask about it later.",
)
_STYLES = ("{name}: {text}", "{name}: {text}", "[{time}] {name}: {text}", "**{name}:** {text}", "<{name}> {text}")


class Plan(NamedTuple):
    """What somebody says. ``{v}`` is the value, ``{a}`` the value with an article, ``{s}`` the speaker."""

    value: str
    statements: tuple[str, ...]
    question: str
    prefix: str
    who: str


PLANS = (
    Plan(
        "city",
        ("I've booked a week in {v} for my holiday.", "We're spending our holiday in {v} this year."),
        "Where is {s} going on holiday?",
        "{s} is going on holiday to",
        "Who is going on holiday to {v}?",
    ),
    Plan(
        "dish",
        ("If you ask me, nothing beats {v}. That's my favourite.", "My favourite dish is still {v}, by the way."),
        "What is the favourite dish of {s}?",
        "The favourite dish of {s} is",
        "Whose favourite dish is {v}?",
    ),
    Plan(
        "clock",
        ("I have to leave the house at {v} tomorrow.", "Tomorrow I have to leave at {v}, so no late night for me."),
        "At what time does {s} have to leave tomorrow?",
        "Tomorrow {s} has to leave at",
        "Who has to leave at {v} tomorrow?",
    ),
    Plan(
        "instrument",
        ("I've started learning to play the {v}.", "My new hobby? I'm taking lessons on the {v}."),
        "Which instrument is {s} learning to play?",
        "{s} is learning to play the",
        "Who is learning to play the {v}?",
    ),
    Plan(
        "firm",
        ("I'm starting a new job at {v} next month.", "Good news: {v} has offered me a job, and I said yes."),
        "Where is {s} starting a new job?",
        "{s} is starting a new job at",
        "Who is starting a new job at {v}?",
    ),
    Plan(
        "dollars",
        ("I paid {v} for my new phone.", "My new phone was {v}, can you believe it?"),
        "How much did {s} pay for the new phone?",
        "For the new phone, {s} paid",
        "Who paid {v} for a new phone?",
    ),
    Plan(
        "belonging",
        ("I bought {a} as a present for my cousin.", "For my cousin's birthday I got {a}."),
        "Which present did {s} buy for a cousin?",
        "The present that {s} bought is",
        "Who bought {a} for a cousin?",
    ),
    Plan(
        "person",
        ("I'm having dinner with my old teacher, {v}, tonight.", "Guess who was my teacher at school: {v}!"),
        "Who was the teacher of {s}?",
        "The teacher of {s} was",
        "Whose teacher was {v}?",
    ),
    Plan(
        "language",
        ("I'm taking evening classes in {v}.", "I've been studying {v} since the winter, it's hard."),
        "Which language is {s} studying?",
        "{s} is studying",
        "Who is studying {v}?",
    ),
    Plan(
        "pet",
        ("Our new puppy is called {v}.", "We've got a puppy now! We named it {v}."),
        "What is the name of the puppy of {s}?",
        "The name of the puppy is",
        "Who has a puppy called {v}?",
    ),
    Plan(
        "street",
        ("I'm moving to {v} in spring.", "We've found a new flat, it's in {v}."),
        "To which street is {s} moving?",
        "{s} is moving to",
        "Who is moving to {v}?",
    ),
    Plan(
        "food",
        ("Please don't put any {v} in it, I'm allergic.", "I can't eat {v}, I've had an allergy since I was a child."),
        "What is {s} allergic to?",
        "{s} is allergic to",
        "Who is allergic to {v}?",
    ),
    Plan(
        "day",
        ("My driving test is on {v}.", "I can't come on {v}, that's when I have my driving test."),
        "On which day is the driving test of {s}?",
        "The driving test of {s} is on",
        "Who has a driving test on {v}?",
    ),
)


def dialogue(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """
    Three to five speakers. Four to ten turns say something about the speaker, all others are small talk.

    Who says a thing is asked for in three of ten samples, and what somebody says in the others.
    """
    check_room("dialogues", length, 224)
    speakers = random.sample(first_names(split), random.randint(3, 5))
    told = draw(random, split, speakers, random.randint(4, max(4, min(10, length // 64))))
    style = random.choice(_STYLES)
    start = opening(random, _OPENINGS)
    minute = random.randrange(8 * 60, 18 * 60)

    def line(speaker: str, text: str, number: int) -> str:
        clock = minute + number
        return style.format(name=speaker, text=text, time=f"{clock // 60 % 24:02}:{clock % 60:02}")

    facts = []
    for speaker, plan, value in told:
        text = random.choice(plan.statements).format(v=value, a=article(value))
        facts.append((speaker, text))
    room = length - count_tokens(start) - sum(count_tokens("\n" + line(*fact, 0)) for fact in facts) - 4

    turns: list[tuple[str, str]] = []

    def lines() -> Iterator[str]:
        for turn in small_talk(random, split, speakers):
            turns.append(turn)
            yield line(*turn, 0)

    n_small = len(fill(lines(), room, count_tokens, joint="\n"))
    depth = swept_depth(index)
    said = turns[:n_small]
    for fact in facts[1:]:
        insert(said, fact, random.random())
    insert(said, facts[0], depth)
    speaker, plan, value = told[0]
    if random.random() < 0.3:
        question, answer, reference = plan.who.format(v=value, a=article(value)), speaker, speaker
        begin = random.choice(("That is", "The answer is", "The person is"))
    else:
        question, begin = plan.question.format(s=speaker), plan.prefix.format(s=speaker)
        answer, reference = article(value) if plan.value == "belonging" else value, value
    return {
        "context": start + "\n".join(line(*turn, number) for number, turn in enumerate(said)),
        "question": asked(random, question, "conversation"),
        "answer_prefix": prefix(random, begin),
        "answer": f" {answer}",
        "references": (reference,),
        "metric": "exact",
        "depth": depth,
    }


def insert(turns: list[tuple[str, str]], turn: tuple[str, str], depth: float) -> None:
    """Put a turn where its speaker has neither the turn before nor the one after, as near to the depth as possible."""

    def distance(place: int) -> tuple[bool, float]:
        return turn[0] in (speaker for speaker, _ in turns[max(0, place - 1) : place + 1]), abs(
            place - depth * len(turns)
        )

    turns.insert(min(range(len(turns) + 1), key=distance), turn)


def draw(random: Random, split: str, speakers: list[str], n: int) -> list[tuple[str, Plan, str]]:
    """Who says what. Nobody says two things of a kind, no two say the same, and no speaker's name is a value."""
    first = random.choice(PLANS)
    drawn: list[tuple[str, Plan, str]] = []
    while len(drawn) < n:
        plan = first if not drawn or random.random() < 0.3 else random.choice(PLANS)
        speaker, value = random.choice(speakers), KINDS[plan.value](random, split)
        free = all((old[0], old[1]) != (speaker, plan) and old[2] != value for old in drawn)
        if free and not set(value.split()) & set(speakers):
            drawn.append((speaker, plan, value))
    return drawn
