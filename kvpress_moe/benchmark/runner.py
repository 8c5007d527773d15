"""A benchmark run: find the samples and cells without a record, evaluate them, and record them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.plan import Cell, Plan
from kvpress_moe.benchmark.records import FORMAT, Records
from kvpress_moe.benchmark.tasks import Sample
from kvpress_moe.budget.allocation import MIN_PAIRS
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.routers.checkpoint import weights_hash


def header(plan: Plan, evaluator: Evaluator, command: str) -> dict[str, Any]:
    """The header of a run's records: its settings, model, versions and methods."""
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
        "min_pairs": MIN_PAIRS,  # pairs of a head, see least_pairs
        "by_bytes": plan.by_bytes,
        "commands": [command],
        "methods": {name: _about(method, evaluator) for name, method in evaluator.methods.items()},
    }


def _about(method: Method, evaluator: Evaluator) -> dict[str, str]:
    """What the records say of a method, and what must not change if they are continued."""
    about = {"group": method.group} | ({"revision": method.revision} if method.revision else {})
    press = method.make(lambda press: press)
    if isinstance(press, MoERouterPress):
        press.post_init_from_model(evaluator.model)
        if press.routers is not None and press.routers.config.trained:
            about["routers"] = weights_hash(press.routers)[:16]
    return about


def missing(wanted: list[Cell], samples: list[Sample], records: Records) -> list[tuple[Sample, list[Cell]]]:
    """The remaining work: samples, each with the cells that have no record."""
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
    Evaluate what is missing of a plan, and record it sample by sample.

    Parameters
    ----------
    plan : Plan
    out : Path
        The run's directory.
    command : str
        Shown in the report.
    evaluator : Evaluator, optional
        An evaluator whose model is already loaded.
    spread : callable, optional
        Evaluates the work elsewhere (see :mod:`kvpress_moe.benchmark.ray_backend`). Default: in this process.
    progress : callable, optional
        Called with the number of samples that are done and the number of all that were missing.

    Returns
    -------
    dict
        Figures of this session: ``samples`` (done now), ``earlier`` (done before), ``cells``, ``seconds``, and
        ``peak_mib``, the peak memory of this process.
    """
    plan.check()
    evaluator = evaluator or Evaluator(plan)
    samples = evaluator.samples
    for sample in samples:
        evaluator.prompt(sample)  # fails before the first record if one does not fit
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
    """Peak of resident memory of this process so far, in MiB; None if the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
