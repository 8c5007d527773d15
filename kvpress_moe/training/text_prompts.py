"""Prompts about texts of the user's own: passages, questions that the model asks about them, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.prompts import Prompt, encode
from kvpress_moe.benchmark.tasks.sample import Sample
from kvpress_moe.errors import SettingError
from kvpress_moe.training.own_questions import fixed_question, write_questions
from kvpress_moe.training.study_prompts import greedy_answer
from kvpress_moe.training.written_documents import WrittenDocument

SHORTEST = 128  # tokens of a context
SUFFIXES = (".txt", ".md", ".rst")
ASKED = 700  # characters of the passage that a question is about


def read_texts(directory: Path) -> dict[str, str]:
    """
    The texts in a directory and below, by name: all files ``.txt``, ``.md`` and ``.rst``, in UTF-8.

    Raises
    ------
    SettingError
        If there are none, or if one cannot be read.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    texts = {}
    for path in paths:
        try:
            texts[str(path.relative_to(directory))] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(
                "texts", str(path), "a readable text in UTF-8", f"{type(error).__name__}: {error}"
            ) from error
    if not any(text.strip() for text in texts.values()):
        raise SettingError(
            "texts", str(directory), f"a directory with texts ({', '.join(SUFFIXES)})", "It has none with text."
        )
    return texts


def contexts(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, length: int, n: int, seed: int
) -> list[tuple[str, str]]:
    """
    ``n`` pieces of the texts that do not overlap, as (name of the text, piece).

    The texts take turns, so that as many of them as possible are heard: pieces of one text say little about others.

    Raises
    ------
    SettingError
        If the texts do not have as many.
    """
    random = Random(f"{seed}/texts")
    names = list(texts)
    random.shuffle(names)
    of_text = [[(name, piece) for piece in _pieces(texts[name], tokenizer, length)] for name in names]
    for pieces in of_text:
        random.shuffle(pieces)
    found = [piece for turn in zip_longest(*of_text) for piece in turn if piece is not None]
    if len(found) < n:
        raise SettingError(
            "prompts",
            n,
            f"at most {len(found)}, the number of pieces of {length} tokens that the texts have",
            "Add texts, or lower --prompts or --length.",
        )
    return found[:n]


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[str]:
    """Consecutive pieces of at most ``length`` tokens. They end with a line where one ends in their last quarter."""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    start, first = 0, 0
    while first < len(ends):
        last = min(first + length, len(ends))
        stop = ends[last - 1]
        if last < len(ends):
            line = text.rfind("\n", start + 3 * (stop - start) // 4, stop)
            stop = line + 1 if line > 0 else stop
        taken = sum(1 for end in ends[first:last] if end <= stop)
        if taken >= min(SHORTEST, length):
            yield text[start:stop]
        start, first = stop, first + max(1, taken)


@torch.no_grad()
def text_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[tuple[str, str]],
    seed: int,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> list[Prompt]:
    """
    One prompt about each piece of text. The model asks a question about a passage of it, and answers it.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    pieces : sequence of (str, str)
        See :func:`contexts`.
    seed : int
    progress : callable
        ``progress(what, done, total)``.
    """
    random = Random(f"{seed}/passages")
    asked = []
    for name, text in pieces:
        start = text.find(" ", random.randrange(max(1, len(text) - ASKED))) + 1
        asked.append(WrittenDocument(Path(name).stem, text[start : start + ASKED]))
    # The kind of a question follows from its place in the list. So texts that take turns are shuffled.
    order = random.sample(range(len(asked)), len(asked))
    written = write_questions(
        model,
        tokenizer,
        [asked[number] for number in order],
        seed,
        progress=lambda done, total: progress("writing questions", done, total),
    )
    questions = [written[order.index(number)] for number in range(len(asked))]
    prompts = []
    for number, ((name, text), passage, question) in enumerate(zip(pieces, asked, questions, strict=True)):
        progress("answering", number, len(pieces))
        question = question or fixed_question(passage.title, random)
        sample = Sample(f"texts/{name}", "tune", 0, number, text, question, "", " -", (), "tokens")
        prompt = encode(sample, tokenizer)
        prompts.append(replace(prompt, answer=torch.tensor([greedy_answer(model, tokenizer, prompt)])))
    progress("answering", len(pieces), len(pieces))
    return prompts
