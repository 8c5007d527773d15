"""
Bytes and decoding time of ragged and packed caches, compared with a uniform cache of equal size, AdaKV's masking and a
full cache. Packed caches take a quarter of a 16-bit cache's bytes; in a float32 model that is an eighth of its bytes.

    python -m experiments.ragged_cache                              SmolLM2 and a small random Llama, 4k and 16k tokens
    python -m experiments.ragged_cache --models random --lengths 2048 --rounds 3
    python -m experiments.ragged_cache --models llama-8b --lengths 32768 --device cuda

All caches of one model and length are decoded in turns in one run, and their medians are compared. So use the ratios,
not the seconds. On a GPU the ragged caches are decoded by each of ``--attentions``: the two of the package, and the
candidates of ``ragged_candidates.py``. The last column is the largest difference between a question's logits and those
of plain PyTorch on the same cache. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

import torch
from kvpress import AdaKVPress, ExpectedAttentionPress

from experiments.ragged_candidates import flash_attention, flex_attention, forget
from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.random_models import RANDOM_MODELS
from kvpress_moe.benchmark.speed import can_compile
from kvpress_moe.cache.attention_dispatch import RaggedAttention, use_ragged_attention
from kvpress_moe.cache.prefill import Prefill, cache_bytes
from kvpress_moe.model.transformers_api import crop, with_cache

RATIO = 0.75
SHARE = 0.25  # of the bytes of a 16-bit cache, for packed caches
PRECISIONS = {"K8V4": [(8, 4)], "K4V4": [(4, 4)], "mixed": "mixed"}
PROSE = "The harbour master writes a report every year, and this is the part about ships, cranes, fish, ice and fog. "
ATTENTIONS: dict[str, str | RaggedAttention] = {
    "torch": "torch",
    "compiled": "compiled",
    "triton": "triton",
    "flash": flash_attention,
    "flex": flex_attention,
}
QUESTION = 24  # tokens


@dataclass
class Way:
    """A cache, the attention that decodes it, and what was measured."""

    cache: object
    masked: list  # of each attention layer: the indices that AdaKV masks, or None
    attention: str = "torch"
    seconds: list[float] = field(default_factory=list)
    difference: float | None = None
    failed: str = ""


def setting(name: str, n_tokens: int, device: str, dtype: torch.dtype | None):
    """A model and a prompt of ``n_tokens``."""
    if name in RANDOM_MODELS:
        model = RANDOM_MODELS[name](n_tokens, device)
        words = torch.randint(0, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    else:
        model, tokenizer = load_model(None, device)
        words = tokenizer(PROSE * (n_tokens // 15), return_tensors="pt").input_ids[:, :n_tokens]
    return (model if dtype is None else model.to(dtype)), words.to(device)


def attention_layers(model) -> list:
    return [layer.self_attn for layer in model.model.layers]


def ways_of(model, ids, attentions: list[str]) -> dict[str, Way]:
    """One prefill, several caches. AdaKV's is the full cache plus masked indices on the attention layers."""
    prefill = Prefill(model, ids)
    nothing = [None] * len(attention_layers(model))
    ours = {
        budget: MoERouterPress(RATIO, experts=["expected_attention"], budget=budget)
        for budget in ("uniform", "layer", "global")
    }
    caches = {budget: prefill.compress(press) for budget, press in ours.items()}
    ways = {"full": Way(prefill.compress(None), nothing), "uniform": Way(caches["uniform"], nothing)}
    for attention in attentions:
        suffix = "" if attentions == ["torch"] else f", {attention}"
        for budget in ("layer", "global"):
            ways[f"ragged, {budget}{suffix}"] = Way(caches[budget], nothing, attention)
    of_16_bits = 1 - SHARE * 2 / prefill.cache.layers[0].keys.element_size()  # SHARE is of a 16-bit cache
    for name, precision in PRECISIONS.items():
        press = MoERouterPress(of_16_bits, experts=["expected_attention"], budget="global", precision=precision)
        cache = prefill.compress(press)
        for attention in ("torch", *["compiled"] * can_compile(model.device)):
            ways[f"packed, {name}{'' if attention == 'torch' else ', compiled'}"] = Way(cache, nothing, attention)
    masking = prefill.compress(AdaKVPress(ExpectedAttentionPress(RATIO)))
    ways["AdaKV, masked"] = Way(masking, [attention.masked_key_indices for attention in attention_layers(model)])
    return ways


def take_back(cache, lengths: list[int]) -> None:
    for layer, length in zip(cache.layers, lengths, strict=True):
        crop(layer, length)


@torch.no_grad()
def read(model, way: Way, blocks: list[torch.Tensor], n_read: int) -> tuple[float, torch.Tensor]:
    """Process blocks of tokens one by one, then remove them. Returns the seconds, and the last block's logits."""
    for attention, indices in zip(attention_layers(model), way.masked, strict=True):
        attention.masked_key_indices = indices
    lengths = [way.cache.get_seq_length(layer_idx) for layer_idx in range(len(way.cache))]
    before = use_ragged_attention(ATTENTIONS[way.attention])
    try:
        started = now(model.device)
        for block in blocks:
            positions = torch.arange(n_read, n_read + block.shape[1], device=block.device)[None]
            logits = model(block, **with_cache(way.cache), position_ids=positions).logits
            n_read += block.shape[1]
        return now(model.device) - started, logits
    finally:
        use_ragged_attention(before)
        take_back(way.cache, lengths)


def attempt(model, way: Way, blocks: list[torch.Tensor], n_read: int) -> tuple[float, torch.Tensor] | None:
    """Like :func:`read`, but an error is stored in ``way.failed``. A new kernel on a GPU may raise anything."""
    try:
        return read(model, way, blocks, n_read)
    except Exception as error:
        way.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".replace("|", "/")
        return None


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(model, ids, rounds: int, n_new: int, attentions: list[str]) -> dict[str, Way]:
    """
    Decode from all caches in turns. A way that fails is left out of further rounds.

    A kernel that writes to wrong memory damages the process, and everything after it fails too. To find this kernel,
    run ``--attentions`` with one name at a time.
    """
    ways = ways_of(model, ids, attentions)
    question, token = ids[:, :QUESTION], torch.zeros_like(ids[:, :1])
    for name, way in ways.items():
        if name.startswith("ragged") and (answer := attempt(model, way, [question], ids.shape[1])):
            by_torch = read(model, replace(way, attention="torch"), [question], ids.shape[1])[1]
            way.difference = (answer[1].float() - by_torch.float()).abs().max().item()
    for round_number in range(rounds + 1):  # the first round warms up
        for way in ways.values():
            if not way.failed and (answer := attempt(model, way, [token] * n_new, ids.shape[1])):
                way.seconds += [answer[0] / n_new] if round_number else []
    return ways


def rows_of(name: str, n_tokens: int, ways: dict[str, Way]) -> list[dict]:
    medians = {method: statistics.median(way.seconds) for method, way in ways.items() if not way.failed}
    full_bytes, uniform = cache_bytes(ways["full"].cache), medians.get("uniform")
    rows = []
    for method, way in ways.items():
        row = {"model": name, "tokens": n_tokens, "cache": method}
        if way.failed:
            rows.append(row | {"failed": way.failed})
            continue
        n_bytes, median = cache_bytes(way.cache), medians[method]
        row |= {
            "mib": n_bytes / 2**20,
            "share_of_full_bytes": n_bytes / full_bytes,
            "ms_per_token": 1000 * median,
            "ms_spread": [1000 * min(way.seconds), 1000 * max(way.seconds)],
            "time_to_uniform": uniform and median / uniform,
            "logits_differ_by": way.difference,
        }
        rows.append(row)
    return rows


def printed(row: dict) -> str:
    start = f"| {row['model']} | {row['tokens']} | {row['cache']} |"
    if "failed" in row:
        return f"{start} failed: {row['failed']} |||||"
    (low, high), to_uniform, difference = row["ms_spread"], row["time_to_uniform"], row["logits_differ_by"]
    return (
        f"{start} {row['mib']:.1f} | {row['share_of_full_bytes']:.1%} | {row['ms_per_token']:.1f} "
        f"({low:.1f}–{high:.1f}) | "
        f"{'' if to_uniform is None else f'{to_uniform:.2f} ×'} | {'' if difference is None else f'{difference:.1e}'} |"
    )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["smollm2", *RANDOM_MODELS], default=["smollm2", "random"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the model's own")
    parser.add_argument("--attentions", nargs="+", choices=list(ATTENTIONS), help="default: torch; on a GPU all")
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    attentions = arguments.attentions or ([name for name in ATTENTIONS if name != "compiled"] if on_gpu else ["torch"])
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    rows = []
    print("| model | tokens | cache | MiB | share of full | ms per token (min–max) | to uniform | logits differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        for n_tokens in arguments.lengths:
            model, ids = setting(name, n_tokens, arguments.device, dtype)
            for row in rows_of(name, n_tokens, measure(model, ids, arguments.rounds, arguments.new_tokens, attentions)):
                rows.append(row)
                print(printed(row), flush=True)
            del model
            forget()
    facts = {
        "compression_ratio": RATIO,
        "processor": torch.cuda.get_device_name(arguments.device) if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: installed(name) for name in ("kvpress-moe", "kvpress", "torch", "transformers", "triton")},
    }
    print(json.dumps({**facts, **vars(arguments), "rows": rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
