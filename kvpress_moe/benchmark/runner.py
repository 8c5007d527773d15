"""A benchmark run: which samples and cells are wanted, which are done, and the evaluation of one sample."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvpress_moe.benchmark.methods import Method, find_methods, touches_windows
from kvpress_moe.benchmark.prompts import SETTINGS, Prompt, check_fits, encode
from kvpress_moe.benchmark.records import COLUMNS, FORMAT, Records
from kvpress_moe.benchmark.tasks import SPLITS, TASKS, Sample, make_sample
from kvpress_moe.errors import SettingError, UnsupportedModelError

Cell = tuple[str, float]


@dataclass(frozen=True)
class Plan:
    """
    What a run is about; plain data, so that it can be sent to other machines.

    Parameters
    ----------
    model : str or None
        As in :func:`kvpress_moe.model.loading.load_model`.
    methods, tasks : tuple of str or None
        ``None``: all that are not slow; all.
    ratios, lengths : tuple
        Compression ratios; context lengths in tokens.
    limit : int
        Samples per task and length.
    seed : int
    split : {"train", "tune", "test"}
    setting : {"agnostic", "aware"}
    sinks, recent : int
        Tokens at both ends that every scorer has to keep.
    min_share : float
        Of budgets that heads share.
    device : str
    hub : str or None
        Take the samples from this data set (a hub id or a directory, in kvpress's schema) instead of generating them.
    """

    model: str | None = None
    methods: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    lengths: tuple[int, ...] = (1024,)
    limit: int = 20
    seed: int = 0
    split: str = "test"
    setting: str = "agnostic"
    sinks: int = 4
    recent: int = 16
    min_share: float = 0.2
    device: str = "cpu"
    hub: str | None = None

    def check(self) -> None:
        """Raise SettingError for the first field that is wrong; before anything is loaded."""
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise SettingError("ratios", ratio, "numbers between 0 and 1", "The full cache is always asked too.")
        for field, allowed in (("split", SPLITS), ("setting", SETTINGS)):
            if getattr(self, field) not in allowed:
                raise SettingError(field, getattr(self, field), f"one of {', '.join(allowed)}", "")
        for field in ("limit", "sinks", "recent"):
            if getattr(self, field) < (field == "limit"):
                raise SettingError(field, getattr(self, field), "a number that is not negative", "")
        for length in self.lengths:
            if length < 64:
                raise SettingError("lengths", length, "at least 64 tokens", "")
        find_methods(self.methods)
        if self.hub is None:
            from kvpress_moe.benchmark.tasks import find_tasks

            find_tasks(self.tasks)


class Evaluator:
    """
    A loaded model that evaluates samples of a plan, one at a time.

    Parameters
    ----------
    plan : Plan
    loaded : tuple, optional
        Model and tokenizer, where they are there already.
    """

    def __init__(self, plan: Plan, loaded: tuple[Any, ...] | None = None):
        from kvpress_moe.model.layers import UNKNOWN_NORMS, check_model, some_layers_slide
        from kvpress_moe.model.loading import load_model

        self.plan = plan
        self.methods: dict[str, Method] = find_methods(plan.methods) | find_methods(["full"])
        self.model, self.tokenizer = loaded or load_model(plan.model, plan.device)
        check_model(self.model)
        if isinstance(self.model, UNKNOWN_NORMS):
            raise UnsupportedModelError(
                f"model: got {type(self.model).__name__}, whose norms of queries and keys kvpress does not know, "
                "expected another. Its presses would compute wrong queries; MoERouterPress itself can serve the model."
            )
        if some_layers_slide(self.model):
            self._leave_windows_alone()

    def _leave_windows_alone(self) -> None:
        """Drop methods that would touch layers with sliding-window attention; refuse those that were named."""
        reasons = {name: touches_windows(method) for name, method in self.methods.items()}
        unfit = {name: reason for name, reason in reasons.items() if reason}
        said = ", ".join(f"{name} {reason}" for name, reason in unfit.items())
        if unfit and self.plan.methods is not None:
            raise SettingError(
                "methods",
                list(unfit),
                "methods that can leave this model's layers with sliding-window attention alone",
                f"{said}. Leave them out.",
            )
        if unfit:
            warnings.warn(f"bench: left out, as some of the model's layers slide: {said}.", stacklevel=3)
        self.methods = {name: method for name, method in self.methods.items() if name not in unfit}

    def cells(self) -> list[Cell]:
        """All (method, ratio) of a sample, the full cache first."""
        methods = [name for name in self.methods if name != "full"]
        return [("full", 0.0), *((name, ratio) for name in methods for ratio in self.plan.ratios)]

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples of the plan, task by task within each index, so that a part of a run is a fair part."""
        plan = self.plan
        if plan.hub is not None:
            from kvpress_moe.benchmark.tasks.hub import load_hub_samples

            samples = load_hub_samples(plan.hub, self.count_tokens)
            return [s for s in samples if s.index < plan.limit and (plan.tasks is None or s.task in plan.tasks)]
        return [
            make_sample(task, self.count_tokens, length, index, plan.seed, plan.split)
            for index in range(plan.limit)
            for length in plan.lengths
            for task in plan.tasks or TASKS
        ]

    def prompt(self, sample: Sample) -> Prompt:
        prompt = encode(sample, self.tokenizer, self.plan.setting)
        check_fits(prompt, sample, self.model.config.get_text_config(decoder=True).max_position_embeddings)
        return prompt

    def evaluate(self, sample: Sample, cells: list[Cell], decode: bool = True) -> dict[str, Any]:
        """
        One prefill, all cells: the record of a sample.

        Without ``decode`` nothing is written out, and F1 scores are 0.
        """
        from kvpress_moe.benchmark.cache_eval import ask, ask_full
        from kvpress_moe.benchmark.metrics import score
        from kvpress_moe.benchmark.multi_pass import judge_alone
        from kvpress_moe.benchmark.shared_prefill import judge

        plan = self.plan
        prompt = self.prompt(sample)
        protection = (plan.sinks, plan.recent, plan.min_share)
        judged = judge(self.model, prompt.context, self.methods, cells, *protection)
        judge_alone(self.model, self.tokenizer, prompt, judged, self.methods, cells, *protection)
        reference = ask_full(self.model, judged.cache, prompt)
        full = self._keep_all(judged, prompt)
        kept = [full if cell[0] == "full" else judged.kept[cell] for cell in cells]
        write = prompt.answer.shape[1] + 8 if decode and sample.metric in ("f1", "any") else 0
        answers = ask(self.model, judged, prompt, reference, kept, write, self._ended)
        results = []
        for (name, ratio), one, answer in zip(cells, kept, answers, strict=True):
            text = None if answer.written is None else self.tokenizer.decode(answer.written, skip_special_tokens=True)
            figures = (answer.nll, answer.kl, answer.hit_rate, answer.n_pairs, answer.n_bytes, one.seconds)
            results.append([name, ratio, score(sample, answer, text), *figures])
        return {
            "sample": sample.id,
            "task": sample.task,
            "length": sample.length,
            "index": sample.index,
            "depth": sample.depth,
            "tokens": prompt.context.shape[1],
            "prefill_s": judged.prefill_seconds,
            "columns": list(COLUMNS),
            "results": results,
        }

    def _keep_all(self, judged: Any, prompt: Prompt) -> Any:
        import torch

        from kvpress_moe.benchmark.shared_prefill import Kept

        layers = [judged.cache.layers[layer_idx] for layer_idx in judged.layers]
        masks = [torch.ones_like(layer.keys[0, :, :, 0], dtype=torch.bool) for layer in layers]
        return Kept(masks, None, prompt.context.shape[1])

    @cached_property
    def _stop_tokens(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return frozenset(token for token in (*ends, self.tokenizer.eos_token_id) if token is not None)

    def _ended(self, tokens: list[int]) -> bool:
        """Whether a decoded answer is whole: the model ended it, or a blank line did, after which no score looks."""
        return tokens[-1] in self._stop_tokens or "\n\n" in self.tokenizer.decode(tokens).strip()


def header(plan: Plan, evaluator: Evaluator, command: str) -> dict[str, Any]:
    """What the records of a run are records of."""
    import platform
    from importlib.metadata import version

    from kvpress_moe import __version__
    from kvpress_moe.model.fingerprint import model_fingerprint
    from kvpress_moe.model.loading import DEFAULT_MODEL

    return {
        "format": FORMAT,
        "model": plan.model or DEFAULT_MODEL,
        "fingerprint": model_fingerprint(evaluator.model),
        "versions": {
            "kvpress_moe": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvpress", "transformers", "torch")},
        },
        "seed": plan.seed,
        "split": plan.split,
        "setting": plan.setting,
        "sinks": plan.sinks,
        "recent": plan.recent,
        "min_share": plan.min_share,
        "commands": [command],
        "methods": {name: {"group": method.group} for name, method in evaluator.methods.items()},
    }


def missing(wanted: list[Cell], samples: list[Sample], records: Records) -> list[tuple[Sample, list[Cell]]]:
    """What is still to be done: samples, each with the cells that no record holds."""
    done = records.done()
    work = []
    for sample in samples:
        cells = [cell for cell in wanted if cell not in done.get(sample.id, ())]
        if cells:
            work.append((sample, cells))
    return work


def run(
    plan: Plan,
    out: Path,
    command: str,
    evaluator: Evaluator | None = None,
    spread: Callable[[Plan, list[tuple[Sample, list[Cell]]]], Iterator[dict[str, Any]]] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """
    Evaluate what is missing of a plan and record it, sample by sample.

    Parameters
    ----------
    plan : Plan
    out : Path
        The run's directory.
    command : str
        Said in the report.
    evaluator : Evaluator, optional
        With the model, where it is loaded already.
    spread : callable, optional
        Evaluates the work elsewhere (see :mod:`kvpress_moe.benchmark.ray_backend`); in this process otherwise.
    progress : callable, optional
        Called with the number of samples that are done and of all.

    Returns
    -------
    dict
        Figures of the session: samples done now and before, seconds, and this process's peak of memory in MiB.
    """
    plan.check()
    evaluator = evaluator or Evaluator(plan)
    samples = evaluator.samples
    for sample in samples:
        evaluator.prompt(sample)  # fails before the first record where one does not fit
    records = Records(out, header(plan, evaluator, command))
    work = missing(evaluator.cells(), samples, records)
    start = time.perf_counter()
    progress(0, len(work))
    evaluate = spread or (lambda _, work: (evaluator.evaluate(sample, cells) for sample, cells in work))
    for done, record in enumerate(evaluate(plan, work), start=1):
        records.add(record)
        progress(done, len(work))
    return {
        "samples": len(work),
        "earlier": len(samples) - len(work),
        "cells": sum(len(cells) for _, cells in work),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> int | None:
    """Peak of resident memory of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
