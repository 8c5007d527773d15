"""Tasks of the benchmark, generated from a seed at any length; modelled on RULER (arXiv 2404.06654)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.cloze import cloze
from kvpress_moe.benchmark.tasks.comparing import comparing
from kvpress_moe.benchmark.tasks.continuation import continuation, copying
from kvpress_moe.benchmark.tasks.counting import counting
from kvpress_moe.benchmark.tasks.dialogue import dialogue
from kvpress_moe.benchmark.tasks.documents import documents
from kvpress_moe.benchmark.tasks.facts import facts
from kvpress_moe.benchmark.tasks.filling import CountTokens
from kvpress_moe.benchmark.tasks.frequent import frequent_words
from kvpress_moe.benchmark.tasks.json_records import json_records
from kvpress_moe.benchmark.tasks.key_value import key_value
from kvpress_moe.benchmark.tasks.needles import needle
from kvpress_moe.benchmark.tasks.questions import question
from kvpress_moe.benchmark.tasks.sample import Sample as Sample
from kvpress_moe.benchmark.tasks.steps import steps
from kvpress_moe.benchmark.tasks.tables import table
from kvpress_moe.benchmark.tasks.variables import variable_tracking
from kvpress_moe.benchmark.tasks.vocabulary import SPLITS as SPLITS
from kvpress_moe.errors import SettingError

__all__ = ["CORE", "SPLITS", "TASKS", "Sample", "find_tasks", "make_sample"]

#: Name -> generator ``f(random, count_tokens, length, index, split) -> fields of a Sample``.
TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "needle_noise": partial(needle, noise=True),
    "needle_prose_1": needle,
    "needle_prose_4": partial(needle, n_keys=4),
    "needle_prose_8": partial(needle, n_keys=8),
    "multi_value": partial(needle, n_values=4),
    "multi_query": partial(needle, n_keys=4, n_asked=4),
    "kv_list": key_value,
    "variable_tracking": variable_tracking,
    "frequent_words": frequent_words,
    "qa_one_hop": question,
    "qa_two_hop": partial(question, hops=2),
    "prose": continuation,
    "code": partial(continuation, code=True),
    "copy": copying,
    "facts": facts,
    "facts_two": partial(facts, n_asked=2),
    "documents": documents,
    "table": table,
    "json_records": json_records,
    "dialogue": dialogue,
    "counting": counting,
    "comparing": comparing,
    "cloze": cloze,
    "steps": steps,
}

#: The tasks of the benchmark where none are named. The published figures are means over them.
CORE = tuple(TASKS)[:14]


def find_tasks(names: Iterable[str] | None) -> tuple[str, ...]:
    """
    Names of tasks. ``None``: the tasks of ``CORE``; ``all`` alone: every task.

    Raises SettingError for an unknown name, with similar known names.
    """
    if names is None:
        return CORE
    names = tuple(names)
    if names == ("all",):
        return tuple(TASKS)
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=3)
            remedy = f"Did you mean {' or '.join(near)}?" if near else ""
            raise SettingError("tasks", name, f"one of {', '.join(TASKS)}, or all alone", remedy)
    return names


def make_sample(
    task: str, count_tokens: CountTokens, length: int, index: int, seed: int = 0, split: str = "test"
) -> Sample:
    """
    One sample; the same arguments give the same sample, in every process.

    Parameters
    ----------
    task : str
    count_tokens : callable
        Text -> number of its tokens, without special tokens.
    length : int
        Largest number of tokens of the context.
    index : int
        Number of the sample. Needles of consecutive samples are at ten depths in turn.
    seed : int
    split : {"train", "tune", "test"}

    Raises
    ------
    SettingError
        If there is no such task or split, or the length is too short for it.
    """
    find_tasks([task])
    if split not in SPLITS:
        raise SettingError("split", split, f"one of {', '.join(SPLITS)}", "")
    random = Random(f"{seed}/{split}/{task}/{length}/{index}")
    return Sample(task, split, length, index, **TASKS[task](random, count_tokens, length, index, split))
