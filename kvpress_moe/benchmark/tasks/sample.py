"""Sample: one prompt of one task, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["exact", "f1", "any", "tokens"]


@dataclass(frozen=True)
class Sample:
    """
    A context, the question about it, and the right answer.

    Attributes
    ----------
    task : str
        Name of the task, see :data:`kvpress_moe.benchmark.tasks.TASKS`.
    split : {"train", "tune", "test"}
        Samples of different splits share no prose, no code, no names.
    length : int
        Requested number of tokens. The context has at most this many, and from 512 on at least 0.8 times this many.
    index : int
        Number of the sample; (task, split, length, index, seed) determine it.
    context : str
        What is compressed.
    question : str
        What comes after the context, in the same user turn; "" if the model continues the context.
    answer_prefix : str
        Beginning of the answer. The model is given it (as in RULER), so that it answers in the expected form.
    answer : str
        The right answer as the model would write it after ``answer_prefix``, with a leading space if one follows.
    references : tuple of str
        What must be in the answer: one string for "exact", one or more for "f1", alternatives for "any", none for
        "tokens".
    metric : {"exact", "f1", "any", "tokens"}
        "exact": the answer is right or not; "f1": several references, all wanted; "any": several references, one is
        enough; "tokens": share of the answer's tokens that are predicted (continuations).
    chat : bool, default=True
        Whether context and question are put into the model's chat template; False for continuations.
    depth : float or None
        Position of the (first) needle in the context, 0 to 1.
    """

    task: str
    split: str
    length: int
    index: int
    context: str
    question: str
    answer_prefix: str
    answer: str
    references: tuple[str, ...]
    metric: Metric
    chat: bool = True
    depth: float | None = None

    @property
    def id(self) -> str:
        """``task/split/length/index``."""
        return f"{self.task}/{self.split}/{self.length}/{self.index}"
