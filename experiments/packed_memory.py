"""
Memory that packed caches really take: of the process, not only of their tensors.

    python -m experiments.packed_memory                        SmolLM2, 4,096 tokens, 25, 10 and 5 % of a 16-bit cache
    python -m experiments.packed_memory --length 8000 --shares 0.25

Every figure comes from a process of its own: resident memory before the prefill, its peak, and afterwards, when freed
memory was given back. The model is loaded in float32, so the shares are of half of the bytes that its cache takes.
"Above no press" is the peak beyond the peak without a press, over the bytes of a 16-bit cache. Prints a table; the last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time

import psutil
import torch
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.runner import peak_mib
from kvpress_moe.cache.prefill import cache_bytes
from kvpress_moe.model.transformers_api import with_cache

PROSE = "The harbour master writes a report every year, and this is the part about ships, cranes, fish, ice and fog. "


def resident() -> int:
    """Bytes of resident memory, after freed memory was given back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def measure(length: int, share: float | None, precision: str | None) -> dict[str, float]:
    """Prefill once in this process."""
    model, tokenizer = load_model()
    input_ids = tokenizer(PROSE * (length // 15), return_tensors="pt").input_ids[:, :length]
    ratio = 0.0 if share is None else 1 - share * 2 / 4
    press = MoERouterPress(ratio, precision=precision)
    with press(model):  # allocates what stays, such as routers
        model.model(input_ids[:, :200], **with_cache(DynamicCache()))
    before, cache = resident(), DynamicCache()
    started = time.perf_counter()
    if share is None:
        model.model(input_ids, **with_cache(cache))
    else:
        with press(model):
            model.model(input_ids, **with_cache(cache))
    seconds, peak = time.perf_counter() - started, peak_mib() or 0
    return {
        "seconds": seconds,
        "peak_bytes": peak * 2**20,
        "held_bytes": resident() - before,
        "cache_bytes": cache_bytes(cache),
        "before_bytes": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--shares", default="0.25,0.1,0.05")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return

    def of(share: float | None) -> dict[str, float]:
        asked = {"length": arguments.length, "share": share, "precision": None if share is None else "mixed"}
        command = [sys.executable, "-m", "experiments.packed_memory", "--child", json.dumps(asked)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    full = of(None)
    whole = full["cache_bytes"] / 2  # of a 16-bit cache
    print("| share | budget, MiB | tensors, MiB | process, MiB | peak above no press | prefill, no press = 1 |")
    print("|---|---|---|---|---|---|")
    rows = {"full": full}
    for share in map(float, arguments.shares.split(",")):
        row = rows[str(share)] = of(share)
        above = (row["peak_bytes"] - full["peak_bytes"]) / whole
        print(
            f"| {share:.0%} | {share * whole / 2**20:.1f} | {row['cache_bytes'] / 2**20:.1f} | "
            f"{row['held_bytes'] / 2**20:.1f} | {above:+.1%} | {row['seconds'] / full['seconds']:.3f} |"
        )
    print(json.dumps({"length": arguments.length, "rows": rows}))


if __name__ == "__main__":
    main()
