"""The report as Markdown: tables over all methods, tables by task, and notes on what the numbers mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpress_moe.benchmark.results import (
    SOLVED,
    Estimate,
    Results,
    best_single,
    mean_over_tasks,
    oracle_values,
    ranked,
)

ORACLE = "best press per task (oracle)"


@dataclass(frozen=True)
class Table:
    """A table of plain cells, to be written as Markdown or HTML."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        title, note = _plain(self.title), _plain(self.note)
        lines = [f"## {title}", "", note, ""] if note else [f"## {title}", ""]
        lines += [_line(self.head), _line(["---", *["---:"] * (len(self.head) - 1)])]
        return "\n".join(lines + [_line(row) for row in self.rows])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """A name as plain text: no tag, link or image that a Markdown viewer would follow, and no line break."""
    return " ".join(text.split()).replace("<", "&lt;").replace("](", "]\\(")


def facts(results: Results) -> list[tuple[str, str]]:
    """What was measured, as (name, text): model, samples, setting, protected tokens, versions, commands."""
    header = results.header
    counts = {task: sum(results.task_of[sample] == task for sample in results.samples) for task in results.tasks}
    per_task = (
        f"{min(counts.values())}"
        if len(set(counts.values())) == 1
        else f"{min(counts.values())} to {max(counts.values())}"
    )
    lengths = ", ".join(str(length) for length in sorted(set(results.length_of.values())))
    return [
        ("Model", str(header["model"])),
        ("Samples", f"{len(results.samples)}: {per_task} for each of {len(counts)} tasks, {lengths} tokens"),
        ("Setting", f"{header['setting']}, split {header['split']}, seed {header['seed']}"),
        (
            "Protected",
            f"the first {header['sinks']} and the last {header['recent']} tokens, for every method that scores",
        ),
        ("Versions", ", ".join(f"{name} {version}" for name, version in header["versions"].items())),
        ("Command", "; ".join(header["commands"])),
    ]


def overview(results: Results, metric: str, title: str, note: str, spec: str) -> Table:
    """Table of methods × ratios: means over tasks, with intervals."""
    head = ["method", "group", *map(results.heading, results.ratios)]
    rows = []
    if metric == "score":
        rows.append(
            [
                "full",
                "reference",
                *[f"{mean_over_tasks(results.by_task(('full', 0.0), metric)):{spec}}"] * len(results.ratios),
            ]
        )
    for method in ranked(results):
        cells = [f"{mean_over_tasks(results.by_task((method, ratio), metric)):{spec}}" for ratio in results.ratios]
        counted = results.counted(method)
        of = "" if counted == len(results.samples) else f" ({counted} of {len(results.samples)} samples)"
        rows.append([method + of, results.group(method), *cells])
    oracles: dict[str, tuple[str, ...] | None] = {ORACLE: None}
    if results.members:
        oracles[f"best of {', '.join(results.members)} per task (oracle)"] = results.members
    for name, among in oracles.items():
        best = [mean_over_tasks(oracle_values(results, ratio, metric, among)) for ratio in results.ratios]
        if not any(np.isfinite(estimate.mean) for estimate in best):
            continue  # no press of kvpress was compared
        rows.append([name, "oracle", *(f"{estimate:{spec}}" for estimate in best)])
    return Table(title, note, head, rows)


def costs(results: Results) -> Table:
    """Table of what each method costs and keeps."""
    head = [
        "method",
        *(
            f"{what}, {results.heading(ratio)}"
            for ratio in results.ratios
            for what in ("pairs kept", "bytes kept", "cost", "hit rate")
        ),
    ]
    rows = []
    for method in ranked(results):
        row = [method]
        for ratio in results.ratios:
            for metric, spec in (("share", ".2%"), ("byte_share", ".2%"), ("cost", ".1%"), ("hit", ".2f")):
                value = mean_over_tasks(results.by_task((method, ratio), metric)).mean
                row.append(f"{value:{spec}}" if np.isfinite(value) else "unknown")
        rows.append(row)
    note = (
        "Pairs and bytes: counted in the cache that answered, over the full cache's, in layers with full attention; "
        "bytes as in a 16-bit cache, codes with their scales, positions and tables. Cost: time "
        "of scoring and selecting over the time of the shared prefill, in one process. Hit rate: share of the "
        "attention of question and answer (full cache) on kept pairs; it does not rank methods."
    )
    return Table("Pairs, bytes, cost, hit rate", note, head, rows)


def versus(results: Results, reference: str) -> Table:
    """Table of KL minus the KL of one method, paired by sample."""
    head = ["method", *map(results.heading, results.ratios)]
    rows = []
    for method in ranked(results):
        if method == reference:
            continue
        cells = []
        for ratio in results.ratios:
            estimate = mean_over_tasks(results.paired((method, ratio), (reference, ratio), "kl"))
            cells.append(f"{estimate:+.4f}{_mark(estimate)}")
        rows.append([method, *cells])
    note = f"KL minus that of `{reference}` on the same samples; * where the 95 % interval leaves out zero."
    return Table(f"Paired differences from {reference}", note, head, rows)


def versus_best_of_task(results: Results, reference: str) -> Table:
    """Table by task: KL of the task's best press, known in hindsight, minus the KL of one method, paired by sample."""
    head = ["task", *map(results.heading, results.ratios)]
    rows = []
    better, worse = [0] * len(results.ratios), [0] * len(results.ratios)
    for task in results.tasks:
        cells = []
        for number, ratio in enumerate(results.ratios):
            best = best_single(results, ratio, task)
            paired = results.paired((best, ratio), (reference, ratio), "kl") if best else {}
            if task not in paired:
                cells.append("–")
                continue
            estimate = mean_over_tasks({task: paired[task]})
            better[number] += bool(_mark(estimate)) and estimate.mean > 0
            worse[number] += bool(_mark(estimate)) and estimate.mean < 0
            cells.append(f"{best} {estimate:+.4f}{_mark(estimate)}")
        rows.append([task, *cells])
    rows.append(
        [f"tasks on which {reference} is better / worse *", *(f"{b} / {w}" for b, w in zip(better, worse, strict=True))]
    )
    note = (
        f"KL minus that of `{reference}` on the same samples, of the press of kvpress that has the lowest KL on these "
        "very samples of the task; * where the 95 % interval leaves out zero."
    )
    return Table(f"The best press of each task against {reference}", note, head, rows)


def _mark(estimate: Estimate) -> str:
    told = estimate.low < estimate.high  # one sample has no interval
    return " *" if told and (estimate.low > 0 or estimate.high < 0) else ""


def quantised(results: Results, reference: str) -> Table:
    """Table of methods that take a share of their own, beside one method at the largest share that is not larger."""
    rows = []
    for method, ratio in results.fixed.items():
        share = mean_over_tasks(results.by_task((method, ratio), "byte_share")).mean
        kl = mean_over_tasks(results.by_task((method, ratio), "kl"))
        smaller = [other for other in results.ratios if 1 - other <= share + 1e-9]
        ours, paired = "–", "–"
        if smaller:
            cell = (reference, min(smaller))
            ours = f"{mean_over_tasks(results.by_task(cell, 'kl')):.4f} ({results.heading(min(smaller))})"
            difference = mean_over_tasks(results.paired((method, ratio), cell, "kl"))
            paired = f"{difference:+.4f}{_mark(difference)}"
        rows.append([method, f"{share:.1%}", f"{kl:.4f}", ours, paired])
    note = (
        f"Every pair stays, with a fixed number of bits; the protected tokens stay whole. `{reference}` beside them "
        "takes the largest measured share of the bytes that is not larger than theirs. KL; the difference is paired by "
        "sample, * where its 95 % interval leaves out zero."
    )
    return Table("Quantised caches", note, ["method", "bytes", "KL", reference, "difference"], rows)


def skills(results: Results) -> Table:
    """Table of what the model can do with its full cache."""
    rows = []
    for task in results.tasks:
        score = results.by_task(("full", 0.0), "score").get(task, np.array([np.nan]))
        nll = results.by_task(("full", 0.0), "nll").get(task, np.array([np.nan]))
        mark = "" if score.mean() >= SOLVED else " †"
        rows.append([task + mark, str(len(score)), f"{score.mean():.2f}", f"{nll.mean():.2f}"])
    note = f"† below {SOLVED}: scores of this task say little; KL and NLL still do."
    return Table("What the full cache can do", note, ["task", "samples", "score", "NLL of the right answer"], rows)


def per_task(results: Results, metric: str, title: str, spec: str, ratio: float) -> Table:
    """Table of methods × tasks at one ratio."""
    head = ["method", *results.tasks]
    rows = []
    for method in (["full"] if metric == "score" else []) + ranked(results):
        by_task = results.by_task((method, 0.0 if method == "full" else ratio), metric)
        rows.append([method, *(f"{by_task[task].mean():{spec}}" if task in by_task else "–" for task in results.tasks)])
    best = [best_single(results, ratio, task) or "–" for task in results.tasks]
    rows.append(["best press of the task", *best])
    return Table(f"{title}, {results.heading(ratio)}", "", head, rows)


def tables(results: Results, reference: str) -> list[Table]:
    """All tables of the report, in order."""
    found = [
        overview(
            results,
            "kl",
            "Divergence from the full cache",
            "Mean KL of the answers' next-token distributions from the full cache's, in nats; the mean of the tasks' "
            "means, 95 % bootstrap intervals. Lower is better. Sorted by the middle ratio.",
            ".4f",
        ),
        overview(
            results,
            "extra",
            "NLL of the right answer beyond the full cache's",
            "Nats per token. Lower is better.",
            ".3f",
        ),
        overview(
            results,
            "score",
            "Task score",
            "Exact match, F1, or share of right tokens; mean over all tasks, also those the model cannot do.",
            ".3f",
        ),
        versus(results, reference),
        *([quantised(results, reference)] if results.fixed else []),
        *([versus_best_of_task(results, reference)] if any(best_single(results, r) for r in results.ratios) else []),
        skills(results),
        costs(results),
    ]
    for ratio in results.ratios:
        found.append(per_task(results, "kl", "KL by task", ".4f" if results.header.get("by_bytes") else ".3f", ratio))
        found.append(per_task(results, "score", "Score by task", ".2f", ratio))
    return found


def markdown(results: Results, found: Sequence[Table], plots: Sequence[tuple[str, str]]) -> str:
    """The whole report as text. ``plots`` are (title, file name)."""
    lines = ["# Benchmark of KV-cache presses", ""]
    lines += [f"- **{name}**: {_plain(text)}" for name, text in facts(results)]
    for title, name in plots:
        lines += ["", f"![{title}]({name})"]
    return "\n".join(lines) + "\n\n" + "\n\n".join(table.markdown() for table in found) + "\n"
