"""kvpress-moe bench: compare every method at every ratio on the same prefills. Records survive a killed run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.options import (
    Device,
    Model,
    check_between,
    check_number,
    check_out_directory,
    numbers,
    split_names,
)
from kvpress_moe.cli.progress import timed_bar
from kvpress_moe.errors import SettingError

EPILOG = """Examples:

kvpress-moe bench --out runs/quick --limit 2 --ratios 0.5,0.75

kvpress-moe bench --out runs/mine --tasks needle_prose_1,kv_list --method "mine=package.module:MyPress(alpha=0.5)"

kvpress-moe report runs/quick

kvpress-moe bench speed
"""


def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory of the records. An interrupted run continues.")] = Path(
        "runs/bench"
    ),
    model: Model = None,
    device: Device = "cpu",
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas. Default: all but the slow ones.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="One more method: a name, or [name=]module:Class(argument=1). Can be repeated."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names, separated by commas, or all. Default: the first 14 of --list.")
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Shares of the KV pairs to remove, separated by commas.")
    ] = "0.5,0.75,0.9",
    shares: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            help="Shares of a 16-bit cache's bytes to keep, instead of --ratios. Methods that evict alone keep this "
            "share of the pairs.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")] = "1024",
    limit: Annotated[int, typer.Option(help="Samples per task and length.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    split: Annotated[str, typer.Option(help="train, tune or test. They share no text and no names.")] = "test",
    setting: Annotated[
        str, typer.Option(help="agnostic: compress before the question is known; aware: with the question.")
    ] = "agnostic",
    sinks: Annotated[int, typer.Option(help="Number of first tokens that every scorer must keep.")] = 4,
    recent: Annotated[int, typer.Option(help="Number of last tokens that every scorer must keep.")] = 16,
    min_share: Annotated[
        float,
        typer.Option(
            help="Every head keeps at least this share of the mean number of pairs; where it is fewer than 40 pairs, "
            "up to twice as many."
        ),
    ] = 0.2,
    hub: Annotated[
        str | None, typer.Option(help="Take the samples from this data set (hub id or directory, kvpress's schema).")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Evaluate samples on a Ray cluster: its address, auto, or local.")
    ] = None,
    compare_naive: Annotated[
        bool,
        typer.Option(
            "--compare-naive",
            help="Only compare times with one prefill per press and ratio: up to 5 samples, no records.",
        ),
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Show methods and tasks.")] = False,
) -> None:
    """
    Compare every method at every ratio: one prefill per sample, records as JSON lines.

    Each line of the records holds, for one sample and all methods: task score, NLL, KL to the full cache, attention
    hit rate, pairs, bytes and seconds. A run that continues evaluates only what is missing.
    """
    if context.invoked_subcommand is not None:
        return

    ratios_, lengths_ = numbers("ratios", ratios, float), numbers("lengths", lengths, int)
    if shares is not None and context.get_parameter_source("ratios").name.startswith("COMMAND"):  # type: ignore[union-attr]
        raise SettingError("ratios", ratios, "no --ratios with --bytes", "A share of the bytes is 1 minus the ratio.")
    if shares is not None:
        kept = numbers("bytes", shares, float)
        for share in kept:
            check_between("bytes", share)
        ratios_ = tuple(round(1 - share, 6) for share in kept)
    for ratio in ratios_:
        check_between("ratios", ratio)
    for length in lengths_:
        check_number("lengths", length, 64)
    check_number("limit", limit, 1)
    check_number("seed", seed, 0, 2**63 - 1)
    check_number("sinks", sinks, 0)
    check_number("recent", recent, 0)
    check_number("min_share", min_share, 0, 1)
    if not (list_all or compare_naive):
        check_out_directory(out)

    from rich.console import Console

    from kvpress_moe.benchmark.evaluator import Evaluator
    from kvpress_moe.benchmark.hooked_baseline import COMPARED, compare
    from kvpress_moe.benchmark.plan import Plan
    from kvpress_moe.benchmark.runner import run

    if list_all:
        show_all(Console())
        return
    names = split_names("methods", methods)
    if method:
        names = (*(names or (default_names() if methods is None else ())), *method)
    plan = Plan(
        model=model,
        methods=COMPARED if compare_naive and names is None else names,
        tasks=split_names("tasks", tasks),
        ratios=ratios_,
        lengths=lengths_,
        limit=limit,
        seed=seed,
        split=split,
        setting=setting,
        sinks=sinks,
        recent=recent,
        min_share=min_share,
        device=device,
        hub=hub,
        by_bytes=shares is not None,
    )
    plan.check()
    if compare_naive:
        print(json.dumps(compare(Evaluator(plan), min(5, limit), plan.ratios), separators=(",", ":")))
        return
    spread = None
    if ray is not None:
        from kvpress_moe.benchmark.ray_backend import over_ray

        spread = over_ray(ray)
    command = shlex.join(["kvpress-moe", *sys.argv[1:]])
    with timed_bar() as step:
        summary = run(plan, out, command, spread=spread, progress=lambda done, total: step("samples", done, total))
    print(json.dumps({"run": str(out), **summary}, separators=(",", ":")))


def default_names() -> tuple[str, ...]:
    from kvpress_moe.benchmark.methods import find_methods

    return tuple(find_methods(None))


def show_all(console: Any) -> None:
    """Print all methods and tasks."""
    from kvpress_moe.benchmark.methods import SLOW, registered
    from kvpress_moe.benchmark.tasks import CORE, TASKS

    for name, found in registered().items():
        console.print(f"{name:36} {found.group}{'  (slow: by name only)' if name in SLOW else ''}", markup=False)
    console.print("\ntasks: " + ", ".join(CORE), markup=False)
    console.print("\nmore tasks, by name only: " + ", ".join(list(TASKS)[len(CORE) :]), markup=False)
