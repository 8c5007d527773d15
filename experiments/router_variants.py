"""
Effect of each part of the training config: train routers with one change each, and compare them on the tune split.

    python experiments/router_variants.py --shards runs/shards                     all variants, three samples per task
    python experiments/router_variants.py --shards runs/shards --end-to-end 3      all of them tuned end to end as well
    python experiments/router_variants.py --shards runs/shards --variants default "top 2" "learned alone"
    python experiments/router_variants.py --shards runs/shards --variants default --routers routers/mine
    python experiments/router_variants.py --shards runs/shards --prompts 48 --epochs 4     smaller, for a first look

Layers are fitted one by one. With --end-to-end, this number of epochs of end-to-end tuning follows (ten minutes per
variant on one core); some variants include this tuning. Captured prompts stay in --shards, so that only the first
variant has to make them (about ten minutes for SmolLM2 on two cores). Fitted layers stay there too. All variants
compress the same prefills with the same global budget. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import load_routers, save_routers
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.trainer import train

VARIANTS = {
    "default": {},  # all five experts judge every token: always balanced, with any weight of the loss
    "attention alone": {"value_weight": 0.0},
    "attention times what is written": {"value_weight": 1.0},
    "teacher replay": {"teacher": "replay"},
    "teacher answer": {"teacher": "answer"},
    "no loss at the thresholds": {"budget_weight": 0.0},
    "learned is blind": {"learned_sees": False},
    "learned alone": {"experts": ("learned",), "top_k": 1},
    "without learned": {"experts": ("keydiff", "leverage", "cur", "tova"), "top_k": 4},
    "static mixture": {"gate": False},
    "top 1": {"top_k": 1},
    "top 2": {"top_k": 2},
    "top 2, aux loss 0": {"top_k": 2, "aux_loss_weight": 0.0},
    "top 2, aux loss 0.001": {"top_k": 2, "aux_loss_weight": 0.001},
    "top 2, aux loss 0.1": {"top_k": 2, "aux_loss_weight": 0.1},
    "top 2, aux loss 1": {"top_k": 2, "aux_loss_weight": 1.0},
    "end to end": {"end_to_end": TrainingConfig().end_to_end},
    "end to end, answers alone": {"end_to_end": TrainingConfig().end_to_end, "replay_weight": 0.0},
    "end to end, replay weight 0.2": {"end_to_end": TrainingConfig().end_to_end, "replay_weight": 0.2},
}


def method(name: str, routers: Routers, seen: dict[str, list[MoERouterPress]]) -> Method:
    """A press with these routers as a method of the benchmark. ``seen`` collects presses for their statistics."""

    def make(protect):
        press = MoERouterPress(router=routers, cache_aware=False)
        seen[name].append(press)
        return protect(press)

    return Method(name, "ours", make, "global", name)


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    return tuple(np.quantile(draws, (0.025, 0.975)))


def mean_over_tasks(kl: dict[tuple[str, str], float]) -> float:
    by_task = defaultdict(list)
    for (task, _), value in kl.items():
        by_task[task].append(value)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--routers", nargs="*", type=Path, default=[], help="directories of more trained routers to compare"
    )
    parser.add_argument(
        "--prompts", type=int, default=120, help="number of training prompts; the shipped routers had 120"
    )
    parser.add_argument("--epochs", type=int, default=TrainingConfig().epochs)
    parser.add_argument("--end-to-end", type=int, default=0, help="epochs of end-to-end tuning")
    parser.add_argument("--out", type=Path, help="save the trained routers here, one directory per variant")
    parser.add_argument("--samples", type=int, default=3, help="samples per task")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--baselines", nargs="*", default=["kvzip_global", "adakv_keydiff"])
    args = parser.parse_args()
    model, tokenizer = load_model()
    trained = {}
    for name in args.variants:
        plain = TrainingConfig(samples=args.prompts, epochs=args.epochs, end_to_end=args.end_to_end)
        config = replace(plain, **VARIANTS[name])
        trained[name], metrics = train(model, tokenizer, config, args.shards)
        if args.out:
            save_routers(trained[name], args.out / name.replace(" ", "-"), metrics)
        print(f"trained: {name}, loss {np.mean(metrics['loss_by_layer']):.3f}", flush=True)
    for directory in args.routers:
        trained[directory.name] = load_routers(directory)
    names = list(trained)
    plan = Plan(methods=("full", *args.baselines), split="tune", limit=args.samples, ratios=tuple(args.ratios))
    evaluator = Evaluator(plan, (model, tokenizer))
    presses: dict[str, list[MoERouterPress]] = defaultdict(list)
    evaluator.methods |= {name: method(name, routers, presses) for name, routers in trained.items()}
    compared = [*args.baselines, *names]
    cells = [("full", 0.0), *((name, ratio) for name in compared for ratio in args.ratios)]
    kl: dict[tuple[str, float], dict] = defaultdict(dict)
    for sample in evaluator.samples:
        for name, ratio, _, _, value, *_ in evaluator.evaluate(sample, cells, decode=False)["results"]:
            kl[name, ratio][sample.task, sample.id] = value
    print_table(names[0], compared, args.ratios, kl, {name: balance(presses[name]) for name in names})


def balance(presses: list[MoERouterPress]) -> dict[str, float]:
    """
    How evenly the experts are used: mean load-balancing loss times E (1: evenly), and the share of all assignments that
    the busiest expert of a layer has, mean over layers.
    """
    used = [press.get_stats() for press in presses]
    busiest = [
        max(layer["router_stats"]["expert_usage_ratios"]) for stats in used for layer in stats["layer_stats"].values()
    ]
    losses = [stats["avg_aux_loss"] for stats in used]
    return {"aux_loss": float(np.mean(losses)) * presses[0].num_experts, "busiest": float(np.mean(busiest))}


def print_table(reference: str, compared: list[str], ratios: list[float], kl: dict, balances: dict) -> None:
    ratio_heads = [f"{ratio:.0%}" for ratio in ratios]
    print(
        "| routers | "
        + " | ".join(ratio_heads)
        + " | difference from the first trained routers at the last ratio | aux loss × E | busiest expert |"
    )
    print("|---|" + "---|" * (len(ratios) + 3))
    rows = []
    for name in compared:
        means = [mean_over_tasks(kl[name, ratio]) for ratio in ratios]
        last = ratios[-1]
        differences = [kl[name, last][key] - kl[reference, last][key] for key in kl[name, last]]
        low, high = interval(differences)
        balanced = balances.get(name)
        texts = [f"{mean:.4f}" for mean in means] + [f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"]
        texts += [f"{balanced['aux_loss']:.2f}", f"{balanced['busiest']:.2f}"] if balanced else ["", ""]
        print(f"| {name} | " + " | ".join(texts) + " |")
        rows.append(
            {"name": name, "kl": means, "difference": [float(np.mean(differences)), low, high], **(balanced or {})}
        )
    samples = len(kl[reference, ratios[0]])
    print(json.dumps({"seed": 0, "split": "tune", "samples": samples, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
