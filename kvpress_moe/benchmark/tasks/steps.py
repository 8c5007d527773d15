"""Numbered instructions; a step, the one after a step, or how long something takes is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.procedures import Made, procedure, titles
from kvpress_moe.benchmark.tasks.wording import asked, capitalised, opening, prefix

_OPENINGS = (
    "Here are several sets of instructions.",
    "Read these instructions. You will be asked about one of the steps.",
    "The following was copied from a notebook.",
)
_HEADS = ("## {title}\n", "{title}\n", "{title}:\n", "How to do it: {title}\n")
_NUMBERS = ("{number}. {text}.", "{number}) {text}", "Step {number}: {text}.", "- Step {number}: {text}")


def steps(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Procedures of five to eight steps that fill the context; the last one may be cut off after any step."""
    check_room("instructions", length, 224)
    head, numbered = random.choice(_HEADS), random.choice(_NUMBERS)
    made: list[Made] = []

    def lines() -> Iterator[str]:
        for title, templates in titles(random, split):
            for step in procedure(random, split, title, templates):
                above = ("\n" if made else "") + head.format(title=capitalised(title)) if step.number == 1 else ""
                made.append(step)
                yield above + numbered.format(number=step.number, text=step.text)

    start = opening(random, _OPENINGS)
    kept = fill(lines(), length - count_tokens(start) - 4, count_tokens, joint="\n")
    shown = made[: len(kept)]
    depth = swept_depth(index)
    place = int(depth * len(shown))
    question, begin, answer = ask(random, shown, place)
    return {
        "context": start + "\n".join(kept),
        "question": asked(random, question, "instructions"),
        "answer_prefix": prefix(random, begin),
        "answer": f" {answer}",
        "references": (answer,),
        "metric": "exact",
        "depth": depth,
    }


def ask(random: Random, shown: list[Made], place: int) -> tuple[str, str, str]:
    """A question about a step: how long it takes (if it takes time), or which it is."""
    step = shown[place]
    title = f'"{capitalised(step.title)}"'
    if step.duration and random.random() < 0.7:
        return step.question, step.prefix, step.duration
    if step.number > 1 and random.random() < 0.4:
        before = shown[place - 1].text
        return f'In {title}, what comes right after "{before}"?', "The next step is:", step.text
    questions = (f"What is step {step.number} of {title}?", f"What does one do in step {step.number} of {title}?")
    return random.choice(questions), f"Step {step.number} of {title} is:", step.text
