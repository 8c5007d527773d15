"""Own questions: short questions about passages, most of them written by the frozen model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.training.sampling import plain_ids, sample_texts
from kvpress_moe.training.written_documents import WrittenDocument

TEMPERATURE = 0.4

#: How the questions begin, in turn. The last one leaves it to the model.
_BEGINNINGS = (" Who", " When", " What", " Where", " How many", " Why", " Which", " Did", " How", "")

#: Questions that need no model, for a share of the passages.
_FIXED = (
    "Summarise in one sentence what is said about {}.",
    "Name all people who are mentioned in connection with {}.",
    "List three facts about {}.",
    "What is the main point of the part about {}?",
    "Which places are named in connection with {}?",
    "Name all years and dates that are given in the part about {}.",
)
_FIXED_EVERY = 6

_COMMON = frozenset(
    re.findall(r"\w+", "text this that what when where which there does have were name question about many most")
)

# Small chat models write better questions when they continue such a list than when they are asked for one.
_FEW_SHOT = """\
Text: The bridge over the Alder was built by the engineer Johanna Rask between 1871 and 1874. It cost 40,000 crowns.
Question: Who built the bridge over the Alder?

Text: Wild garlic grows in damp woods. Its leaves are gathered in March, because they turn bitter when it flowers.
Question: Why are the leaves of wild garlic gathered in March?

Text: The Kestrel was a weekly newspaper in Leeds. Its editor, Tom Arden, sold it in 1932 to a printer from York.
Question: When was The Kestrel sold?

Text: {passage}
Question:{beginning}"""


def write_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[WrittenDocument],
    seed: int,
    batch: int = 12,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[str | None]:
    """
    Write one short question about each passage.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    passages : sequence of WrittenDocument
        Every sixth one gets a fixed question about its title.
    seed : int
    batch : int
        Number of questions that are written at once.
    progress : callable
        ``progress(done, total)``.

    Returns
    -------
    list
        None where the model wrote no question.
    """
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    questions: list[str | None] = [None] * len(passages)
    open_ones = []
    for number, passage in enumerate(passages):
        if number % _FIXED_EVERY == _FIXED_EVERY - 1:
            questions[number] = fixed_question(passage.title, random)
        else:
            open_ones.append(number)
    open_ones.sort(key=lambda number: len(passages[number].text))  # rows of a batch have similar lengths
    for start in range(0, len(open_ones), batch):
        progress(start, len(open_ones))
        numbers = open_ones[start : start + batch]
        beginnings = [_BEGINNINGS[number % len(_BEGINNINGS)] for number in numbers]
        requests = [
            plain_ids(tokenizer, _FEW_SHOT.format(passage=" ".join(passages[number].text.split()), beginning=beginning))
            for number, beginning in zip(numbers, beginnings, strict=True)
        ]
        texts = sample_texts(
            model, tokenizer, requests, generator, 32, TEMPERATURE, is_complete=lambda text: "?" in text or "\n" in text
        )
        for number, beginning, text in zip(numbers, beginnings, texts, strict=True):
            found = first_question(beginning + text)
            questions[number] = found if found and is_about(found, passages[number]) else None
    progress(len(open_ones), len(open_ones))
    return questions


def fixed_question(title: str, random: Random) -> str:
    """A question that can be asked about any passage."""
    return random.choice(_FIXED).format(title)


def first_question(text: str) -> str | None:
    """The first line of a text that holds a question, without marks around it; None if there is none."""
    for line in text.splitlines():
        found = re.match(r"[\W\d]*(?:question\s*\d*\s*:\s*)?[\W_]*(\w[^?]{9,200}\?)", line, re.IGNORECASE)
        if found:
            return " ".join(found[1].split())
    return None


def is_about(question: str, passage: WrittenDocument) -> bool:
    """Whether a question shares a longer word with the passage, and has no names and numbers that are not in it."""
    told = f"{passage.title} {passage.text}".lower()
    words = set(re.findall(r"\w{4,}", question.lower())) - _COMMON
    names = re.findall(r"\b(?:[A-Z]\w+|\d+)", question.partition(" ")[2])
    return bool(words & set(re.findall(r"\w{4,}", told))) and all(name.lower() in told for name in names)
