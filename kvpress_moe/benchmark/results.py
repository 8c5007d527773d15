"""From the records of runs to the numbers of the report: means over tasks, paired differences, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpress_moe.benchmark.records import read_header, read_records
from kvpress_moe.errors import SettingError

RESAMPLES = 2000
SOLVED = 0.5  # lowest full-cache score with which the scores of a task mean something
_MUST_AGREE = ("model", "fingerprint", "seed", "split", "setting", "sinks", "recent", "min_share", "min_pairs")
METRICS = ("score", "nll", "kl", "hit", "pairs", "bytes", "seconds")

Cell = tuple[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass
class Results:
    """
    All records of one or several runs of the same kind.

    Attributes
    ----------
    header : dict
        Header of the first run, with the methods and commands of all runs.
    tasks : list of str
    samples : list of str
        Ids of the samples.
    task_of, depth_of, length_of : dict
        Sample -> its task, depth, length.
    values : dict of (method, ratio) -> dict of sample -> dict of metric -> float
        NaN if unknown. ``score``, ``nll``, ``kl``, ``hit``, ``pairs``, ``bytes`` as recorded; ``extra`` is the NLL
        minus the full cache's, ``cost`` the compression's time over the prefill's, ``share`` the pairs over all,
        ``byte_share`` the bytes over those of a 16-bit cache.
    members : tuple of str
        Methods from which a second oracle chooses.
    """

    header: dict[str, Any]
    tasks: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    task_of: dict[str, str] = field(default_factory=dict)
    depth_of: dict[str, float | None] = field(default_factory=dict)
    length_of: dict[str, int] = field(default_factory=dict)
    values: dict[Cell, dict[str, dict[str, float]]] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.values))

    @property
    def ratios(self) -> list[float]:
        """Ratios that methods were asked for; not those of methods that take a share of their own."""
        return sorted({ratio for method, ratio in self.values if method != "full" and not self.is_fixed(method)})

    @property
    def fixed(self) -> dict[str, float]:
        """Methods that take a share of their own -> their ratio."""
        return {method: ratio for method, ratio in self.values if self.is_fixed(method)}

    def is_fixed(self, method: str) -> bool:
        return self.group(method) == "quantised"

    def heading(self, ratio: float) -> str:
        """A ratio in words."""
        return f"{1 - ratio:.4g} of the bytes" if self.header.get("by_bytes") else f"{ratio:.0%} evicted"

    def group(self, method: str) -> str:
        group: str = self.header["methods"].get(method, {}).get("group", "third-party")
        return group

    def counted(self, method: str) -> int:
        """Number of samples with a record of the method, at the ratio that has the fewest."""
        cells = [values for (name, _), values in self.values.items() if name == method]
        return min(len(cell) for cell in cells)

    def by_task(self, cell: Cell, metric: str, samples: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Task -> metric of its samples (all, or those given), in the records' order, without unknown values."""
        found: dict[str, list[float]] = {}
        values = self.values.get(cell, {})
        for sample in self.samples if samples is None else samples:
            value = values.get(sample, {}).get(metric, np.nan)
            if np.isfinite(value):
                found.setdefault(self.task_of[sample], []).append(value)
        return {task: np.array(of_task) for task, of_task in found.items()}

    def paired(self, cell: Cell, other: Cell, metric: str) -> dict[str, np.ndarray]:
        """Task -> differences (cell minus other) over the samples that both have."""
        found: dict[str, list[float]] = {}
        for sample in self.samples:
            one = self.values.get(cell, {}).get(sample, {}).get(metric, np.nan)
            two = self.values.get(other, {}).get(sample, {}).get(metric, np.nan)
            if np.isfinite(one - two):
                found.setdefault(self.task_of[sample], []).append(one - two)
        return {task: np.array(of_task) for task, of_task in found.items()}


def load(runs: Sequence[Path], tasks: Sequence[str] | None = None) -> Results:
    """
    Read the records of runs. Several lines of one sample are merged; an incomplete last line is left out.

    Parameters
    ----------
    runs : sequence of Path
    tasks : sequence of str, optional
        Use only the records of these tasks.

    Raises
    ------
    SettingError
        If a run cannot be read, if there is no record (of a task), or if a run cannot be compared with the first one.
    """
    headers = [read_header(run) for run in runs]
    for run, header in zip(runs, headers, strict=True):
        for name in _MUST_AGREE:
            if header.get(name) != headers[0].get(name):
                raise SettingError(
                    "RUN",
                    str(run),
                    f"a run of the same {name} as the first ({headers[0].get(name)!r}, this one {header.get(name)!r})",
                    "Report them one by one.",
                )
    merged = dict(headers[0])
    merged["methods"] = {name: about for header in headers for name, about in header["methods"].items()}
    merged["commands"] = list(dict.fromkeys(command for header in headers for command in header["commands"]))
    results = Results(merged)
    for run in runs:
        for record in read_records(run):
            if tasks is None or record["task"] in tasks:
                _add(results, record)
    for task in tasks or ():
        if task not in results.tasks:
            raise SettingError("tasks", task, "tasks that the runs hold records of", "`report.md` names them.")
    if not results.ratios:
        raise SettingError(
            "RUN", ", ".join(map(str, runs)), "at least one record of a press", "Run `kvpress-moe bench` first."
        )
    for cell in results.values.values():
        for sample, values in cell.items():
            full = results.values.get(("full", 0.0), {}).get(sample, {})
            values["extra"] = values["nll"] - full.get("nll", np.nan)
            values["share"] = values["pairs"] / (full.get("pairs") or np.nan)
            values["byte_share"] = values["bytes"] / (full.get("bytes") or np.nan)
    return results


def _add(results: Results, record: dict[str, Any]) -> None:
    sample, task = record["sample"], record["task"]
    if sample not in results.task_of:
        results.samples.append(sample)
        results.task_of[sample] = task
        results.depth_of[sample] = record.get("depth")
        results.length_of[sample] = record["length"]
        if task not in results.tasks:
            results.tasks.append(task)
    for row in record["results"]:
        named = dict(zip(record["columns"], row, strict=True))
        values = {name: np.nan if named[name] is None else float(named[name]) for name in METRICS}
        values["cost"] = values["seconds"] / (record.get("prefill_s") or np.nan)
        results.values.setdefault((named["method"], named["ratio"]), {})[sample] = values


def mean_over_tasks(by_task: dict[str, np.ndarray], seed: int = 0) -> Estimate:
    """
    The mean of the tasks' means, with its interval. Every task has the same weight.

    Percentile bootstrap: samples are resampled within each task, 2,000 times.
    """
    if not by_task:
        return Estimate(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for values in by_task.values():
        drawn += values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(1) / len(by_task)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(np.mean([values.mean() for values in by_task.values()])), float(low), float(high))


def best_single(
    results: Results, ratio: float, task: str | None = None, among: Sequence[str] | None = None
) -> str | None:
    """
    The press of kvpress (or the method of ``among``) with the lowest mean KL at a ratio, over all tasks or for one.

    It is chosen on the reported samples themselves, which favours it: it is an oracle.
    """
    found = {}
    for method in results.methods:
        if method not in among if among is not None else results.group(method) != "kvpress":
            continue
        by_task = results.by_task((method, ratio), "kl")
        by_task = {task: by_task[task]} if task in by_task else {} if task else by_task
        if by_task:
            found[method] = np.mean([values.mean() for values in by_task.values()])
    return min(found, key=lambda method: found[method]) if found else None


def oracle_values(
    results: Results, ratio: float, metric: str, among: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Task -> metric of the press (or of the method of ``among``) with the lowest KL at this task."""
    found = {}
    for task in results.tasks:
        best = best_single(results, ratio, task, among)
        by_task = results.by_task((best, ratio), metric) if best else {}
        if task in by_task:
            found[task] = by_task[task]
    return found


def best_of_ours(results: Results) -> str:
    """The best method of the group "ours" (presses of this package, also with your routers), else the best of all."""
    order = ranked(results)
    return next((method for method in order if results.group(method) == "ours"), order[0])


def ranked(results: Results, metric: str = "kl") -> list[str]:
    """Methods by the mean of a metric at the middle ratio, lowest first; without the full cache."""
    middle = results.ratios[len(results.ratios) // 2]

    def key(method: str) -> float:
        value = mean_over_tasks(results.by_task((method, middle), metric)).mean
        return value if np.isfinite(value) else np.inf

    others = (method for method in results.methods if method != "full" and not results.is_fixed(method))
    return sorted(others, key=key)
