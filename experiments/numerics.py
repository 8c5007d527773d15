"""
Share of the pairs kept in float32 that a press also keeps in bfloat16 and float16.

    python experiments/numerics.py                      the whole built-in text, 804 tokens
    python experiments/numerics.py --n-tokens 300

There are two figures for each dtype. "stages": only the press uses the dtype. It scores the hidden states, keys and
values of the float32 model, rounded to the dtype, with rounded weights. "model": the model's forward pass uses the
dtype too. Takes one or two minutes. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.model.layers import language_model
from kvpress_moe.model.transformers_api import with_cache

PRESSES: dict[str, Callable[[float], MoERouterPress]] = {
    "trained routers, budget global": lambda ratio: WatchedPress(ratio, cache_aware=False),
    "trained routers, budget uniform": lambda ratio: WatchedPress(ratio, cache_aware=False, budget="uniform"),
    "the four built-in window and attention experts, budget uniform": lambda ratio: WatchedPress(
        ratio, 4, cache_aware=False
    ),
    "expected_attention, budget global": lambda ratio: WatchedPress(
        ratio, experts=["expected_attention"], budget="global"
    ),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
RATIOS = (0.5, 0.75, 0.9)


class WatchedPress(MoERouterPress):
    """A press that stores which pairs stay, by layer."""

    def record(self, layer_idx: int, observation: Observation, kept: Tensor) -> None:
        self.__dict__.setdefault("kept", {})[layer_idx] = kept
        super().record(layer_idx, observation, kept)


def prefill(model: PreTrainedModel, input_ids: Tensor) -> tuple[list[dict[str, Any]], DynamicCache]:
    """Prefill a prompt. Returns the arguments of each attention layer, and the full cache."""
    calls: list[dict[str, Any]] = []
    cache = DynamicCache()

    def note(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({"hidden_states": args[0] if args else kwargs["hidden_states"], **kwargs})

    hooks = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in language_model(model).layers
    ]
    with torch.no_grad():
        model.model(input_ids=input_ids, **with_cache(cache))
    for hook in hooks:
        hook.remove()
    return calls, cache


def kept_pairs(
    model: PreTrainedModel, press: MoERouterPress, calls: list[dict[str, Any]], full: DynamicCache, dtype: torch.dtype
) -> Tensor:
    """The pairs (L, B, H, S) that stay when the press compresses these calls, rounded to a dtype."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    cache = DynamicCache([(rounded(layer.keys), rounded(layer.values)) for layer in full.layers])
    with torch.no_grad(), press(model):
        for layer, call, stored in zip(language_model(model).layers, calls, list(cache.layers), strict=True):
            kwargs = {name: rounded(value) for name, value in call.items()} | {"past_key_values": cache}
            pair = press.compress(layer.self_attn, kwargs["hidden_states"], stored.keys, stored.values, None, kwargs)
            if not isinstance(cache.layers[layer.self_attn.layer_idx], RaggedLayer):
                stored.keys, stored.values = pair
    return torch.stack([press.kept[index] for index in sorted(press.kept)])


def share_kept(kept: Tensor, of: Tensor) -> float:
    """Share of the pairs marked in ``of`` that are marked in ``kept``."""
    return (kept & of).sum().item() / of.sum().item()


def compare(model: PreTrainedModel, input_ids: Tensor) -> list[dict[str, Any]]:
    """One row for each press, ratio and dtype."""
    exact_calls, exact_cache = prefill(model, input_ids)
    exact = {
        (name, ratio): kept_pairs(model, make(ratio), exact_calls, exact_cache, torch.float32)
        for name, make in PRESSES.items()
        for ratio in RATIOS
    }
    rows = []
    for dtype_name, dtype in DTYPES.items():
        half = copy.deepcopy(model).to(dtype)
        half_calls, half_cache = prefill(half, input_ids)
        for (name, ratio), expected in exact.items():
            stages = kept_pairs(half, PRESSES[name](ratio), exact_calls, exact_cache, dtype)
            whole = kept_pairs(half, PRESSES[name](ratio), half_calls, half_cache, dtype)
            rows.append(
                {
                    "press": name,
                    "ratio": ratio,
                    "dtype": dtype_name,
                    "stages": share_kept(stages, expected),
                    "model": share_kept(whole, expected),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=None)
    settings = parser.parse_args()
    model, tokenizer = load_model(dtype=torch.float32)
    text = (files("kvpress_moe") / "data" / "harbour.txt").read_text(encoding="utf-8")
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : settings.n_tokens]
    rows = compare(model, input_ids)
    print(f"| press | evicted | dtype | stages | model |\n|{'---|' * 5}  ({input_ids.shape[1]} tokens)")
    for row in rows:
        print(f"| {row['press']} | {row['ratio']:.0%} | {row['dtype']} | {row['stages']:.2%} | {row['model']:.2%} |")
    print(json.dumps({"n_tokens": input_ids.shape[1], "rows": rows}))


if __name__ == "__main__":
    main()
