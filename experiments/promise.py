"""
Is the promise of ``max_kl`` kept, and what does it save?

First every prompt is measured at all shares of the calibration (seconds for each prompt; an interrupted run continues).
Then, for each bound: the share of the prompts whose KL divergence stays within it (coverage), the mean share of the
bytes that they keep, and the fixed share that has the same 90th percentile of the KL divergence. Between the measured
shares the KL divergence is interpolated, as in the calibration. ``--verify N`` compresses N of the prompts with the
press itself, and compares.

    python -m experiments.promise --out results/promise
    python -m experiments.promise --out runs/natural --hub DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpress_moe.benchmark.prompts import Prompt, encode
from kvpress_moe.benchmark.tasks import CORE, make_sample
from kvpress_moe.benchmark.tasks.hub import load_hub_samples
from kvpress_moe.model.loading import load_model
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.promised_budget import setting_of
from kvpress_moe.routers.promise import LEAST, Promise, cautious, share_at
from kvpress_moe.training.calibration import KINDS, measure, tensors
from kvpress_moe.training.config import HELD_OUT

BOUNDS = (0.005, 0.02, 0.1)
UNSEEN = [task for task in HELD_OUT if task not in KINDS]  # by training and by the calibration
PRECISIONS = {"mixed": "mixed", "none": None}


def prompts_of(kind: str, tokenizer: Any, first: int, limit: int, hub: str | None) -> Iterator[Prompt]:
    """The prompts of a set: ``test``, ``unseen``, ``longer`` or ``hub``."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    if kind == "hub":
        assert hub is not None
        for sample in load_hub_samples(hub, count_tokens)[:: max(1, 80 // limit)]:
            yield encode(sample, tokenizer)
        return
    tasks = {"test": CORE, "longer": CORE, "unseen": UNSEEN}[kind]
    for index in range(first, first + limit):
        for task in tasks:
            sample = make_sample(task, count_tokens, 3072 if kind == "longer" else 1024, index, 0, "test")
            yield encode(sample, tokenizer)


def divergence_at(logs: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
    """KL divergence (N,) of each prompt at its own share, on lines between the measured ones; 0 at a share of 1."""
    position = torch.searchsorted(shares.log(), chosen.log().contiguous()).clamp(1, len(shares) - 1)
    left, right = shares.log()[position - 1], shares.log()[position]
    at = ((chosen.log() - left) / (right - left)).clamp(0, 1)
    rows = torch.arange(len(logs))
    between = torch.lerp(logs[rows, position - 1], logs[rows, position], at).exp()
    return torch.where(chosen >= 1, 0.0, between)


def chosen_shares(
    promise: Promise, features: Tensor, lost: Tensor, bound: float, confidence: float
) -> tuple[Tensor, Tensor]:
    """What the promise gives each prompt (N,), and which prompts are unlike those of the calibration."""
    estimates = promise.estimate.at(features, lost, promise.shares)
    unlike = promise.are_unlike(features)
    usual, safe = promise.margin(bound, confidence), promise.margin(bound, cautious(confidence))
    given = [
        share_at(row, promise.shares, math.log(bound) - (safe if is_unlike else usual))
        for row, is_unlike in zip(estimates, unlike.tolist(), strict=True)
    ]
    return torch.tensor(given, dtype=torch.float64), unlike


def table(promise: Promise, measured: Sequence[Any], confidence: float) -> list[dict[str, float]]:
    """One row for each bound."""
    features, lost, divergences = tensors(measured)
    logs = divergences.clamp(min=LEAST).log()
    rows = []
    for bound in BOUNDS:
        given, unlike = chosen_shares(promise, features, lost, bound, confidence)
        reached = divergence_at(logs, promise.shares, given)
        fixed = fixed_share(logs, promise.shares, float(reached.quantile(0.9)))
        same = equal_mean(promise, logs, float(given.mean()))
        kept = reached <= bound * 1.001
        rows.append(
            {
                "max_kl": bound,
                "coverage": float(kept.double().mean()),
                "covered_or_warned": float((kept | unlike).double().mean()),
                "warned": float(unlike.double().mean()),
                "mean_share": float(given.mean()),
                "fixed_share": fixed,
                "kl_p90": float(reached.quantile(0.9)),
                "kl_p95": float(reached.quantile(0.95)),
                "fixed_kl_p95": float(same.quantile(0.95)),
            }
        )
    return rows


def fixed_share(logs: Tensor, shares: Tensor, target: float) -> float:
    """The share for all prompts whose KL divergences have this 90th percentile."""
    low, high = math.log(float(shares[0])), 0.0
    for _ in range(40):
        middle = (low + high) / 2
        chosen = torch.full((len(logs),), math.exp(middle), dtype=torch.float64)
        if float(divergence_at(logs, shares, chosen).quantile(0.9)) > target:
            low = middle
        else:
            high = middle
    return math.exp(high)


def equal_mean(promise: Promise, logs: Tensor, mean_share: float) -> Tensor:
    """KL divergences of all prompts at one fixed share."""
    return divergence_at(logs, promise.shares, torch.full((len(logs),), mean_share, dtype=torch.float64))


def say(kind: str, done: int, total: int) -> None:
    """Print how far the measurements are."""
    print(f"{kind} {done}/{total}", flush=True)


def verified(
    model: Any, prompt: Prompt, *, router: str | None, bound: float, precision: str | None
) -> dict[str, float]:
    """Compress a prompt with the press itself: the KL divergence of its cache's answer, and what it kept."""
    press = MoERouterPress(router=router, precision=precision, max_kl=bound)
    context, rest = prompt.context, torch.cat((prompt.question, prompt.answer[:, :-1]), dim=1)
    n_logits = prompt.answer.shape[1]
    cache, whole = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.model(input_ids=context, **with_cache(whole))
        with press(model):
            model.model(input_ids=context, **with_cache(cache))
        logs = [
            model(rest, **with_cache(one), logits_to_keep=n_logits).logits[0].float().log_softmax(-1)
            for one in (whole, cache)
        ]
    (report,) = press.get_stats()["promises"]
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().clamp(min=0))
    return {"max_kl": bound, "kl": kl, "share": report["share"], "expected_kl": report["expected_kl"]}


def as_markdown(found: dict[str, list[dict[str, float]]], about: Sequence[str]) -> str:
    """The tables of all sets."""
    columns = {
        "max_kl": "`max_kl`",
        "coverage": "stay within",
        "covered_or_warned": "stay within, or warned",
        "warned": "warned",
        "mean_share": "mean share kept",
        "fixed_share": "fixed share, same 90th percentile",
        "ratio": "ratio",
        "kl_p95": "95th percentile",
        "fixed_kl_p95": "of the fixed share, same mean",
        "tail": "ratio",
    }
    lines = ["# Is the promise kept?", "", *about]
    for name, rows in found.items():
        lines += ["", f"## {name}", "", "| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            row = row | {"ratio": row["mean_share"] / row["fixed_share"], "tail": row["kl_p95"] / row["fixed_kl_p95"]}
            lines.append("| " + " | ".join(_shown(key, row[key]) for key in columns) + " |")
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float) -> str:
    if name in ("coverage", "covered_or_warned", "warned", "mean_share", "fixed_share"):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if name in ("ratio", "tail") else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for measurements and tables")
    parser.add_argument("--router", help="directory of calibrated routers; default: those in the package")
    parser.add_argument("--sets", nargs="+", default=["test", "unseen"], help="test, unseen, longer or hub")
    parser.add_argument("--limit", type=int, default=10, help="samples of each task; with --hub: of the whole set")
    parser.add_argument("--first", type=int, default=0, help="number of the first sample of each task")
    parser.add_argument("--hub", help="directory of prompts in kvpress's columns")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--verify", type=int, default=0, help="prompts of each set that the press itself compresses")
    parser.add_argument("--measure-only", action="store_true", help="write no tables; the routers need no calibration")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(arguments.model)
    presses = {name: MoERouterPress(router=arguments.router, precision=p) for name, p in PRECISIONS.items()}
    for press in presses.values():
        press.post_init_from_model(model)
    found: dict[str, Any] = {}
    checked: dict[str, Any] = {}
    for kind in arguments.sets:
        prompts = list(prompts_of(kind, tokenizer, arguments.first, arguments.limit, arguments.hub))
        measured = measure(model, prompts, presses, arguments.out / f"{kind}.jsonl", partial(say, kind))
        if arguments.measure_only:
            continue
        for name, press in presses.items():
            assert press.routers is not None
            promise = press.routers.promises[setting_of(press.menu)]
            title = f"{kind}, precision {PRECISIONS[name] or 'None'}, {len(prompts)} prompts"
            found[title] = table(promise, measured[name], arguments.confidence)
            some = Random(0).sample(prompts, min(arguments.verify, len(prompts)))
            own = partial(verified, model, router=arguments.router, precision=PRECISIONS[name])
            checked[title] = [own(prompt, bound=bound) for prompt in some for bound in BOUNDS]
    if arguments.measure_only:
        return
    name = "-".join(arguments.sets)
    versions = ", ".join(f"{package} {version(package)}" for package in ("kvpress-moe", "torch", "transformers"))
    command = shlex.join(["python", "-m", "experiments.promise", *sys.argv[1:]])
    model_name = model.config.name_or_path.rstrip("/").split("/")[-1]
    about = [
        f"Command: `{command}`. Confidence {arguments.confidence:g}; model {model_name}; seed 0; {versions}; float32.",
        "",
        "*Stay within*: share of the prompts whose KL divergence is at most `max_kl`. *Warned*: share that is unlike "
        "the calibration. *Fixed share*: the one share for all prompts that has the same 90th percentile of the KL "
        "divergence. Last columns: 95th percentiles of the KL divergence at the same mean share.",
    ]
    (arguments.out / f"{name}.json").write_text(json.dumps({"tables": found, "verified": checked}, indent=1) + "\n")
    text = as_markdown(found, about)
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
