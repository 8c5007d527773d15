"""
CPU time of each stage of the trained press, as a share of the time of a prefill, on one thread.

    python experiments/profile_press.py                   4,096 tokens
    python experiments/profile_press.py --tokens 1024
    python experiments/profile_press.py --precision mixed

CPU time is measured, so that other processes have little effect. One thread is used, because threads of torch that wait
use CPU time too. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.speed import read_prompt
from kvpress_moe.budget.cross_layer import SharedBudget
from kvpress_moe.budget.shared_bytes import SharedBytes
from kvpress_moe.cache import PackedLayer, RaggedLayer
from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.experts import mixing
from kvpress_moe.experts.expert import Expert
from kvpress_moe.press import packer

#: Owner, function, and name of the row. The row of an expert gets the expert's name.
STAGES: tuple[tuple[Any, str, str], ...] = (
    (MoERouterPress, "compress", "the press, all in all"),
    (MoERouterPress, "route", "router and gate"),
    (Expert, "score", "expert"),
    (mixing, "ranks_of", "ranks within the head, experts' scores included"),
    (mixing, "mix_calibrated", "sum of the calibrated terms"),
    (MoERouterPress, "observe", "attention of the latest queries, for hit rates"),
    (SharedBudget, "decide", "decision of the shared budget"),
    (RaggedLayer, "from_dense", "copy of what stays"),
    (packer, "cost_of_strategies", "costs of the strategies"),
    (SharedBytes, "decide", "decision of the shared budget of bytes"),
    (PackedLayer, "from_strategies", "coding of what stays"),
)


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        spent[f"expert {args[0].name}" if name == "expert" else name] += time.process_time() - start
        return result

    return watched


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--precision", help="as in `kvpress-moe ask`; then the ratio is a share of bytes")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_model()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=generator)
    ours = MoERouterPress(args.ratio, precision=parse_precision(args.precision))
    read = partial(read_prompt, model, input_ids)
    read(None), read(ours)  # warm up
    base = statistics.median(cpu_seconds(partial(read, None)) for _ in range(args.rounds))
    spent: dict[str, float] = defaultdict(float)
    with ExitStack() as leave:
        for owner, function, name in STAGES:
            leave.enter_context(patch.object(owner, function, timed(getattr(owner, function), name, spent)))
        for _ in range(args.rounds):
            read(ours)
    shares = {name: seconds / args.rounds / base for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}
    print(f"| stage, {args.tokens:,} tokens | share of the prefill |\n|---|---|")
    for name, share in shares.items():
        print(f"| {name} | {share:.2%} |")
    print(json.dumps({"tokens": args.tokens, "prefill_cpu_seconds": round(base, 2), "shares": shares}))


if __name__ == "__main__":
    main()
