"""Prompt: a sample as token ids, with context, question and right answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvpress_moe.benchmark.tasks.sample import Sample
from kvpress_moe.errors import SettingError
from kvpress_moe.model.chat_template import cut_message

SETTINGS = ("agnostic", "aware")


@dataclass(frozen=True)
class Prompt:
    """
    A sample as token ids, each of shape (1, n).

    Attributes
    ----------
    context : Tensor
        What is compressed.
    question : Tensor
        What comes after it, up to the answer's first token; at least one token.
    answer : Tensor
        The right answer.
    n_prefix : int
        Number of first tokens of the context that belong to the chat template or to the tokenizer (``<bos>``).
    """

    context: Tensor
    question: Tensor
    answer: Tensor
    n_prefix: int = 0

    def __len__(self) -> int:
        return self.context.shape[1] + self.question.shape[1] + self.answer.shape[1]


def encode(sample: Sample, tokenizer: PreTrainedTokenizerBase, setting: str = "agnostic") -> Prompt:
    """
    Put a sample into the model's chat template, and cut it where the cache is compressed.

    If the tokenizer has no chat template (base models), context, question and the beginning of the answer are plain
    text, each on its own lines.

    Parameters
    ----------
    sample : Sample
    tokenizer : PreTrainedTokenizerBase
    setting : {"agnostic", "aware"}
        Whether the context is compressed before the question is seen, or together with it.
    """
    context, question, prefix = sample.context, sample.answer_prefix, ""
    chat = sample.chat and bool(tokenizer.chat_template)
    if sample.chat and not chat:
        context, question = context + "\n", "\n" + sample.question + "\n" + sample.answer_prefix
    if chat:
        own = sample.context + "\n"
        context, question = cut_message(tokenizer, own, "\n" + sample.question)
        prefix = context[: len(context) - len(own if context.endswith(own) else own.lstrip())]
        question += sample.answer_prefix
    if sample.chat and setting == "aware":
        # The cache is compressed when all tokens before the answer but the last one are in it.
        context, question = context + question, ""
    ids = [
        tokenizer(part, add_special_tokens=not chat and first, return_tensors="pt").input_ids.to(torch.int64)
        for part, first in ((context, True), (question, False), (sample.answer, False))
    ]
    if ids[1].shape[1] == 0:  # no question: the context's last token takes its place
        ids[0], ids[1] = ids[0][:, :-1], ids[0][:, -1:]
    n_prefix = len(tokenizer(prefix, add_special_tokens=False).input_ids) if prefix else 0
    if not chat and ids[0][0, 0] == tokenizer.bos_token_id:
        n_prefix = 1
    if not tokenizer.chat_template:
        _check_cuts(tokenizer, [context, question, sample.answer], torch.cat(ids, 1)[0])
    return Prompt(ids[0], ids[1], ids[2], n_prefix)


def _check_cuts(tokenizer: PreTrainedTokenizerBase, parts: list[str], ids: Tensor) -> None:
    """Raise if a tokenizer adds something at the beginning of every part, for example SentencePiece's dummy prefix."""
    in_parts, whole = (
        tokenizer.decode(some, skip_special_tokens=True) for some in (ids, tokenizer("".join(parts)).input_ids)
    )
    if in_parts != whole:
        raise SettingError(
            "model",
            type(tokenizer).__name__,
            "a tokenizer that reads the parts of a text as it reads the whole",
            "Without a chat template the benchmark cannot serve it: use the model's instruct version.",
        )


def check_fits(prompt: Prompt, sample: Sample, limit: int) -> None:
    """Raise SettingError if a prompt is longer than the model allows."""
    if len(prompt) > limit:
        raise SettingError(
            "lengths",
            sample.length,
            f"contexts that fit into the model's {limit} tokens with question and answer ({sample.id}: {len(prompt)})",
            "Ask for a shorter length.",
        )
