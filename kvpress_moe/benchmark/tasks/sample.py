"""Sample: one prompt of one task, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["exact", "f1", "any", "tokens"]


@dataclass(frozen=True)
class Sample:
    """
    A context, what is asked after it, and what a model that still remembers the context would answer.

    Attributes
    ----------
    task : str
        Name of the task, see :data:`kvpress_moe.benchmark.tasks.TASKS`.
    split : {"train", "tune", "test"}
        Samples of different splits share no prose, no code, no names.
    length : int
        Tokens asked for; the context has at most so many, and from 512 on at least 0.8 times as many.
    index : int
        Number of the sample; (task, split, length, index, seed) determine it.
    context : str
        What is compressed.
    question : str
        What comes after the context, in the same user turn; "" where the model goes on writing.
    answer_prefix : str
        How the answer begins; given to the model (as in RULER), so that it answers in the expected form.
    answer : str
        The right answer as the model would write it after ``answer_prefix``, with a leading space where one follows.
    references : tuple of str
        What is looked for in the answer: one string for "exact", one or more for "f1", alternatives for "any", none for
        "tokens".
    metric : {"exact", "f1", "any", "tokens"}
        "exact": the answer is right or not; "f1": several references, all wanted; "any": several, one of which is
        enough; "tokens": share of the answer's tokens that are guessed right (continuations).
    chat : bool, default=True
        Whether context and question are put into the model's chat template; False for continuations.
    depth : float or None
        Where in the context the (first) needle lies, 0 to 1.
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
