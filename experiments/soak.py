"""
Process thousands of prompts with the same presses and the same model. Memory, hooks and statistics must not grow.

    python -m experiments.soak                       2,000 prompts, a tiny model with random weights
    python -m experiments.soak --prompts 400 --seed 1

Three presses take turns: one with untrained routers, one with untrained routers and `track_misses`, one with calibrated
routers. The first and the last change at random between a uniform budget and one that all heads share. Prompts have 2
to 300 tokens. Every third call has two prompts, one call in fifty fails half-way, and four tokens are generated after
each prompt. Ten times the same short prompt is processed, garbage is collected, and a row is printed: resident memory,
Python's objects, live tensors and their bytes, hooks, numbers in the statistics. The last line is one JSON document.
The exit status is 1 if something grew from the second row (the first is the warm-up) to the last.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from kvpress_moe import MoERouterPress
from tests.tiny import calibrated_routers, tiny_model, tokens

#: How much a figure may grow. The allocator and Python's caches always change a little; tensors and hooks must not.
ALLOWED = {"rss_mib": 8.0, "objects": 200, "tensors": 0, "tensor_bytes": 0, "hooks": 0, "statistics": 0}


@dataclass(frozen=True)
class Figures:
    """
    All figures at one moment.

    Attributes
    ----------
    prompts : int
        Number of prompts so far.
    rss_mib : float
        Resident memory of this process.
    objects : int
        Objects that Python's garbage collector knows.
    tensors, tensor_bytes : int
        Live tensors, and bytes of their storages, each counted once.
    hooks : int
        Hooks on all modules of the model.
    statistics : int
        Numbers in the statistics of all presses.
    """

    prompts: int
    rss_mib: float
    objects: int
    tensors: int
    tensor_bytes: int
    hooks: int
    statistics: int


def take(prompts: int, model: PreTrainedModel, presses: Sequence[MoERouterPress]) -> Figures:
    """The figures at this moment."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [thing for thing in objects if issubclass(type(thing), torch.Tensor)]
    storages = dict(filter(None, map(storage, tensors)))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    numbers = sum(count_numbers(press.get_stats()) for press in presses)
    rss = psutil.Process().memory_info().rss / 2**20
    return Figures(prompts, rss, len(objects), len(tensors), sum(storages.values()), hooks, numbers)


def storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Address and bytes of a tensor's memory; None if torch.compile or vmap gave it none."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:  # also NotImplementedError
        return None


def count_numbers(stats: Any) -> int:
    """Numbers in nested dicts and lists."""
    if isinstance(stats, dict):
        return sum(map(count_numbers, stats.values()))
    return sum(map(count_numbers, stats)) if isinstance(stats, list) else 1


def fail(*args: Any) -> None:
    raise MemoryError("injected")


def read(model: PreTrainedModel, press: MoERouterPress, n_tokens: int, n_prompts: int, seed: int, fails: bool) -> None:
    """Process prompts of one length with a press, and generate four tokens after them."""
    input_ids = tokens(n_tokens, n_prompts, seed)
    hook = model.model.layers[1].register_forward_pre_hook(fail) if fails else None
    try:
        with press(model):
            model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=4, do_sample=False)
    except MemoryError:
        if not fails:
            raise
    finally:
        if hook is not None:
            hook.remove()


def soak(
    n_prompts: int,
    presses: Sequence[MoERouterPress],
    model: PreTrainedModel,
    seed: int = 0,
    stops: int = 10,
    row: Callable[[Figures], Any] = lambda figures: None,
) -> list[Figures]:
    """Process prompts. ``stops`` times on the way, take figures and give them to ``row``. Returns all figures."""
    rng = random.Random(seed)
    rows: list[Figures] = []
    done = call = 0
    while done < n_prompts:
        press = presses[call % len(presses)]
        if not press.track_misses:
            press.budget = rng.choice(["uniform", "global"])
        at_once = 2 if call % 3 == 2 else 1
        read(model, press, rng.randint(2, 300), at_once, rng.randrange(2**31), fails=call % 50 == 49)
        done, call = done + at_once, call + 1
        if done >= n_prompts * (len(rows) + 1) / stops:
            for press in presses:  # they may hold something of their last prompt
                read(model, press, 64, 1, 0, fails=False)
            rows.append(take(done, model, presses))
            row(rows[-1])
    return rows


def grown(rows: Sequence[Figures]) -> dict[str, float]:
    """What grew by more than is allowed, and by how much."""
    first, last = rows[1], rows[-1]
    growth = {name: getattr(last, name) - getattr(first, name) for name in ALLOWED}
    return {name: round(by, 2) for name, by in growth.items() if by > ALLOWED[name]}


def make_presses(model: PreTrainedModel) -> list[MoERouterPress]:
    return [
        MoERouterPress(0.5),
        MoERouterPress(0.75, num_experts=3, track_misses=True),
        MoERouterPress(0.75, router=calibrated_routers(model)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model("llama", num_hidden_layers=3)
    names = [field.name for field in fields(Figures)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")

    def row(figures: Figures) -> None:
        shown = (f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in asdict(figures).values())
        print(f"| {' | '.join(shown)} |", flush=True)

    started = time.perf_counter()
    rows = soak(args.prompts, make_presses(model), model, args.seed, row=row)
    too_much = grown(rows)
    seconds = round(time.perf_counter() - started)
    print(f"\n{'FAIL' if too_much else 'PASS'}")
    print(json.dumps({"passed": not too_much, "grown": too_much, "seconds": seconds}, separators=(",", ":")))
    sys.exit(bool(too_much))


if __name__ == "__main__":
    main()
