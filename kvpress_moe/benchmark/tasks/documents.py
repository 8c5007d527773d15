"""Titled documents about people, firms and places; one detail of one of them is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.profiles import described
from kvpress_moe.benchmark.tasks.vocabulary import cities, firms, people
from kvpress_moe.benchmark.tasks.wording import asked, opening, prefix

_OPENINGS = (
    "Read the following documents. I will ask a question about them afterwards.",
    "Below are some search results.",
    "Here are several articles from an encyclopedia. Keep their details in mind.",
)
_HEADS = (
    "Document {number}: {title}\n",
    "## {title}\n",
    "[{number}] {title} - ",
    "{title}: ",
    "Title: {title}\nText: ",
    "**{title}**\n",
)


def documents(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Documents of three to six sentences that fill the context; the last one may be shorter."""
    check_room("documents", length, 224)
    subjects = [("person", name) for name in people(split)]
    subjects += [("firm", name) for name in random.sample(firms(split), min(len(firms(split)), len(subjects)))]
    subjects += [("city", name) for name in cities(split)]
    random.shuffle(subjects)
    head = random.choice(_HEADS)
    questions: list[tuple[str, str, str]] = []

    def pieces() -> Iterator[str]:
        for number, (kind, name) in enumerate(subjects, 1):
            start = ("\n\n" if number > 1 else "") + head.format(number=number, title=name)
            for text, *rest in described(random, split, kind, name, random.randint(3, 6)):
                questions.append((rest[0], rest[1], rest[2]))
                yield start + text
                start = " "

    before = opening(random, _OPENINGS)
    kept = fill(pieces(), length - count_tokens(before) - 4, count_tokens, joint="")
    depth = swept_depth(index)
    question, begin, answer = questions[int(depth * len(kept))]
    return {
        "context": before + "".join(kept),
        "question": asked(random, question, random.choice(("text", "documents"))),
        "answer_prefix": prefix(random, begin),
        "answer": f" {answer}",
        "references": (answer,),
        "metric": "exact",
        "depth": depth,
    }
