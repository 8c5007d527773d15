"""RULER and LongBench from the hub, in kvpress's schema, as samples of the benchmark."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kvpress_moe.benchmark.tasks.filling import CountTokens
from kvpress_moe.benchmark.tasks.sample import Metric, Sample
from kvpress_moe.errors import SettingError

_COLUMNS = ("context", "question", "answer_prefix", "task")


def load_hub_samples(name: str, count_tokens: CountTokens) -> list[Sample]:
    """
    Samples of a data set.

    Parameters
    ----------
    name : str
        ``owner/name`` or ``owner/name:config`` on the hub (``simonjegou/ruler:4096``, ``Xnhyacinth/LongBench:qasper``),
        or a directory of parquet or JSON-lines files. Columns: context, question, answer_prefix, task, and answer or
        answers (a string or a list).

    Raises
    ------
    SettingError
        If ``datasets`` is not installed, or there is no such data set, or a column is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SettingError("hub", name, "the package datasets", "pip install kvpress-moe[bench]") from error
    try:
        if Path(name).is_dir():
            kind, suffix = ("parquet", "*.parquet") if list(Path(name).glob("*.parquet")) else ("json", "*.jsonl")
            rows = load_dataset(kind, data_files=[str(path) for path in sorted(Path(name).glob(suffix))], split="train")
        else:
            repository, _, config = name.partition(":")
            rows = load_dataset(repository, config or None, split="test")
    except Exception as error:  # datasets raises many kinds
        raise SettingError("hub", name, "a data set that can be read", f"{type(error).__name__}: {error}") from error
    missing = [column for column in _COLUMNS if column not in rows.column_names]
    if missing or not {"answer", "answers"} & set(rows.column_names):
        raise SettingError("hub", name, f"columns {', '.join(_COLUMNS)} and answer", f"It has {rows.column_names}.")
    numbers: Counter[str] = Counter()
    samples = []
    for row in rows:
        answers = row["answer"] if "answer" in rows.column_names else row["answers"]
        references = tuple(map(str, answers)) if isinstance(answers, (list, tuple)) else (str(answers),)
        metric: Metric = "exact" if len(references) == 1 else "any" if _alternatives(name, row["task"]) else "f1"
        task = f"{Path(name.partition(':')[0]).name}/{row['task']}"
        samples.append(
            Sample(
                task,
                "test",
                count_tokens(row["context"]),
                numbers[task],
                row["context"],
                row["question"],
                row["answer_prefix"] or "",
                " " + (references[0] if metric == "any" else ", ".join(references)),
                references,
                metric,
            )
        )
        numbers[task] += 1
    return samples


def _alternatives(name: str, task: str) -> bool:
    """Whether several answers are alternatives (LongBench, RULER's qa); all are wanted otherwise (RULER's needles)."""
    return "longbench" in name.lower() or str(task).startswith("qa")
