"""
Does the router's choice of a strategy for every pair earn its keep? It is compared with simpler rules.

    python -m experiments.strategy_choice                                  routers that ship, 5 samples of each task
    python -m experiments.strategy_choice --router routers/mine --also before=routers/old --out results/strategies

All rules get the same byte budget, the same prefill and, except those of --also, the same scores:

- routed: the routers' own rule, `precision="mixed"`;
- constants: the same scores and menu; the rule that routers have that were not trained for strategies;
- K2V2, K3V3, …: one precision for all pairs that stay, for each entry of the menu and a few more. The first token
  stays whole, as with all rules. The best of them at each share, on the same samples, is "best single precision";
- rdkv: RDKV's rule (arXiv 2605.08317), as in the benchmark;
- --also NAME=DIRECTORY: other routers with `precision="mixed"`.

Test split, the tasks of the benchmark. Prints a table of mean KL to the full cache; brackets are 95 % bootstrap
intervals of the paired difference from the first row. With --out, the samples are written to OUT.jsonl as they are
done, and a run that was interrupted continues; the table goes to OUT.md. About 20 seconds a sample for SmolLM2 on one
core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.router_variants import interval
from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.methods import Method, find_methods
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.codes.distortion import Distortion
from kvpress_moe.codes.precision import Precision
from kvpress_moe.model.layers import language_model
from kvpress_moe.press.packing import N_SINK
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import load_routers
from kvpress_moe.routers.resolve import shipped_routers
from kvpress_moe.routers.strategy_rule import StrategyRule

SINGLE = ((2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (6, 4), (8, 4), (8, 8))


def without_rule(routers: Routers) -> Routers:
    """The same routers, as if they had not been trained to choose strategies."""
    plain = Routers(replace(routers.config, strategies=False), routers.fingerprint)
    plain.load_state_dict({name: weights for name, weights in routers.state_dict().items() if ".rule." not in name})
    plain.key_transforms = routers.key_transforms
    return plain


class OnlySinksWhole(StrategyRule):
    """Lets no pair stay as the model wrote it, except those of the first tokens. Two bits would ruin these."""

    def log_costs(self, scores: Tensor, worths: Tensor, distortion: Distortion, menu: Sequence[Precision]) -> Tensor:
        costs = super().log_costs(scores, worths, distortion, menu)
        costs[-1, ..., N_SINK:] = torch.inf
        return costs


def only_sinks_whole(routers: Routers) -> Routers:
    """Routers with that rule. The rule's worths stay, as they say which pairs go."""
    changed = deepcopy(routers)
    for layer in changed.layers:
        layer.rule.__class__ = OnlySinksWhole
    return changed


def with_precision(name: str, routers: Routers, precision: Any) -> Method:
    make: Callable[..., Any] = partial(MoERouterPress, router=routers, precision=precision, cache_aware=False)
    return Method(name, "ours", lambda protect: make(), "global", name, precision="own")


def methods_of(routers: Routers, also: dict[str, Routers]) -> dict[str, Method]:
    """The methods to compare, the routed one first."""
    single = {f"K{keys}V{values}": [(keys, values), (16, 16)] for keys, values in SINGLE}
    sinks_whole = only_sinks_whole(routers)
    found = [with_precision("routed", routers, "mixed"), with_precision("constants", without_rule(routers), "mixed")]
    found += [with_precision(name, sinks_whole, precision) for name, precision in single.items()]
    found += [with_precision(name, others, "mixed") for name, others in also.items()]
    return {method.name: method for method in found} | find_methods(["rdkv"])


def table(kl: dict[str, dict[float, list[float]]], shares: list[float], names: list[str]) -> list[str]:
    """The lines of a Markdown table."""

    def cell(row: str, share: float, of_row: list[float]) -> str:
        mean = f"{np.mean(of_row):.4f}"
        if row == "routed":
            return mean
        low, high = interval((np.array(of_row) - np.array(kl["routed"][share])).tolist())
        return f"{mean} [{low:+.4f}, {high:+.4f}]"

    single = [name for name in names if name[0] == "K" and name[1:2].isdigit()]
    best = {share: min(single, key=lambda name: np.mean(kl[name][share])) for share in shares}
    lines = ["| rule | " + " | ".join(f"{share:.4g}" for share in shares) + " |", "|---|" + "---|" * len(shares)]
    for name in [name for name in names if name not in single]:
        lines.append(f"| {name} | " + " | ".join(cell(name, share, kl[name][share]) for share in shares) + " |")
    cells = [f"{best[share]}: {cell('single', share, kl[best[share]][share])}" for share in shares]
    lines.append("| best single precision | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", type=Path, help="directory of trained routers; default: those that ship")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.1, 0.0625, 0.05])
    parser.add_argument("--samples", type=int, default=5, help="of each task")
    parser.add_argument("--hub", help="samples of a data set instead, see `kvpress-moe bench --hub`")
    parser.add_argument("--out", type=Path, help="path of the results, without a suffix")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    routers = shipped_routers(language_model(model).layers[0].self_attn)
    if arguments.router:
        routers = load_routers(arguments.router)
    if routers is None:
        parser.error("no routers ship for this model: name --router")
    if not routers.config.strategies:
        parser.error("these routers were not trained to choose strategies")
    also = {name: load_routers(directory) for name, _, directory in (text.partition("=") for text in arguments.also)}
    shares = arguments.shares
    plan = Plan(limit=arguments.samples, hub=arguments.hub, ratios=tuple(1 - share for share in shares), by_bytes=True)
    evaluator = Evaluator(replace(plan, methods=("full",)), (model, tokenizer))
    evaluator.methods = methods_of(routers, also)
    names = list(evaluator.methods)
    cells = [(name, 1 - share) for name in names for share in shares]
    kl: dict[str, dict[float, list[float]]] = {name: {share: [] for share in shares} for name in names}
    done: dict[str, list[float]] = {}
    records = arguments.out.with_suffix(".jsonl") if arguments.out else None
    asked = {
        "router": arguments.router and str(arguments.router),
        "also": arguments.also,
        "shares": shares,
        "hub": arguments.hub,
    }
    if records and records.exists():
        first, *lines = map(json.loads, records.read_text().splitlines())
        if first != asked:
            parser.error(f"--out: {records} is of another run ({first}). Name another path, or delete it.")
        done = {line["sample"]: line["kl"] for line in lines}
    elif records:
        records.parent.mkdir(parents=True, exist_ok=True)
        records.write_text(json.dumps(asked) + "\n")
    for number, sample in enumerate(evaluator.samples):
        if sample.id not in done:
            results = evaluator.evaluate(sample, cells, decode=False)["results"]
            done[sample.id] = [round(result[4], 7) for result in results]
            if records:
                with records.open("a") as file:
                    file.write(json.dumps({"sample": sample.id, "kl": done[sample.id]}) + "\n")
        for (name, ratio), value in zip(cells, done[sample.id], strict=True):
            kl[name][min(shares, key=lambda share: abs(share - 1 + ratio))].append(value)
        print(f"{number + 1}/{len(evaluator.samples)} {sample.id}", flush=True)
    lines = table(kl, shares, names)
    print("\n".join(lines))
    if arguments.out:
        about = (
            f"Mean KL to the full cache at shares of the bytes of a 16-bit cache; {len(evaluator.samples)} samples "
            f"({arguments.hub or 'test split, seed 0, 1,024 tokens'}); {arguments.model or 'SmolLM2-135M-Instruct'}, "
            f"float32; torch {torch.__version__.split('+')[0]}, transformers {version('transformers')}, kvpress "
            f"{version('kvpress')}.\nIn brackets: 95 % bootstrap intervals of the difference from the first row."
        )
        text = "\n".join(["# Rules for the choice of a strategy", "", about, "", *lines, ""])
        arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
