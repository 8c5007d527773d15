"""
Bytes and decoding time of a ragged cache, beside a uniform cache of the same bytes, AdaKV's masking and the full cache.

    python benchmarks/ragged_cache.py                              SmolLM2 and a small random Llama, 4k and 16k tokens
    python benchmarks/ragged_cache.py --models random --lengths 2048 --rounds 3

All caches of one model and length are decoded in turns within one run, round after round; medians are compared, so read
the ratios, not the seconds. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version

import torch
from kvpress import AdaKVPress, ExpectedAttentionPress

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.speed import small_llama
from kvpress_moe.prefill import Prefill, cache_bytes

RATIO = 0.75
PROSE = "The harbour master writes a report every year, and this is the part about ships, cranes, fish, ice and fog. "


def setting(name: str, n_tokens: int):
    """A model and a prompt of ``n_tokens``."""
    if name == "random":
        return small_llama(n_tokens), torch.randint(0, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    model, tokenizer = load_model()
    words = tokenizer(PROSE * (n_tokens // 15), return_tensors="pt").input_ids[:, :n_tokens]
    return model, words


def caches(model, ids) -> dict:
    """One prefill, four caches. AdaKV's is the full one plus masked indices on the attention layers."""
    prefill = Prefill(model, ids)
    ours = {
        "uniform": MoERouterPress(RATIO, experts=["expected_attention"]),
        "ragged, layer": MoERouterPress(RATIO, experts=["expected_attention"], budget="layer"),
        "ragged, global": MoERouterPress(RATIO, experts=["expected_attention"], budget="global"),
    }
    made = {"full": prefill.compress(None)} | {name: prefill.compress(press) for name, press in ours.items()}
    made["AdaKV, masked"] = prefill.compress(AdaKVPress(ExpectedAttentionPress(RATIO)))
    return made


def attention_layers(model) -> list:
    return [layer.self_attn for layer in model.model.layers]


def seconds_per_token(model, cache, masked, n_read: int, n_tokens: int) -> float:
    """Decode ``n_tokens`` one by one and take them off again."""
    for attention, indices in zip(attention_layers(model), masked, strict=True):
        attention.masked_key_indices = indices
    lengths = [cache.get_seq_length(layer_idx) for layer_idx in range(len(cache))]
    token = torch.zeros(1, 1, dtype=torch.long)
    started = time.perf_counter()
    with torch.no_grad():
        for step in range(n_tokens):
            model(token, past_key_values=cache, position_ids=torch.tensor([[n_read + step]]))
    elapsed = (time.perf_counter() - started) / n_tokens
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return elapsed


def measure(name: str, n_tokens: int, rounds: int, n_new: int) -> list[dict]:
    model, ids = setting(name, n_tokens)
    made = caches(model, ids)
    masked_by_adakv = [attention.masked_key_indices for attention in attention_layers(model)]
    nothing = [None] * len(masked_by_adakv)
    times: dict[str, list[float]] = {method: [] for method in made}
    for round_number in range(rounds + 1):  # the first round warms up
        for method, cache in made.items():
            masked = masked_by_adakv if "masked" in method else nothing
            seconds = seconds_per_token(model, cache, masked, ids.shape[1], n_new)
            if round_number:
                times[method].append(seconds)
    full_bytes, uniform = cache_bytes(made["full"]), statistics.median(times["uniform"])
    return [
        {
            "model": name,
            "tokens": ids.shape[1],
            "cache": method,
            "mib": cache_bytes(cache) / 2**20,
            "share_of_full_bytes": cache_bytes(cache) / full_bytes,
            "ms_per_token": 1000 * statistics.median(times[method]),
            "ms_spread": [1000 * min(times[method]), 1000 * max(times[method])],
            "time_to_uniform": statistics.median(times[method]) / uniform,
        }
        for method, cache in made.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["smollm2", "random"], default=["smollm2", "random"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=8)
    arguments = parser.parse_args()
    rows = []
    print("| model | tokens | cache | MiB | share of full | ms per token (min–max) | to uniform |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        for n_tokens in arguments.lengths:
            for row in measure(name, n_tokens, arguments.rounds, arguments.new_tokens):
                rows.append(row)
                low, high = row["ms_spread"]
                print(
                    f"| {row['model']} | {row['tokens']} | {row['cache']} | {row['mib']:.1f} | "
                    f"{row['share_of_full_bytes']:.1%} | {row['ms_per_token']:.1f} ({low:.1f}–{high:.1f}) | "
                    f"{row['time_to_uniform']:.2f} × |",
                    flush=True,
                )
    versions = {package: version(package) for package in ("kvpress-moe", "kvpress", "torch", "transformers")}
    facts = {"compression_ratio": RATIO, "threads": torch.get_num_threads(), "versions": versions, **vars(arguments)}
    print(json.dumps({**facts, "rows": rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
