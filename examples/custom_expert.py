"""
Two ways to bring an expert of one's own: a function that scores pairs, and a subclass with named strategies.

    python examples/custom_expert.py
"""

import torch
from kvpress import SnapKVPress
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, load_model

TEXT = "The regatta was held on the second Sunday of July. Sixteen boats started and fourteen finished. " * 10


def large_values(module, hidden_states, keys, values, attentions, kwargs):
    """Keep what writes most: the norm of the value, (batch, KV heads, pairs)."""
    return values.norm(dim=-1)


class StridePress(MoERouterPress):
    """Knows one strategy that the table does not: keep every n-th token."""

    def _apply_expert_compression(self, keys, values, strategy, router_probs):
        stride = int(strategy.removeprefix("every_"))
        return keys[:, :, ::stride], values[:, :, ::stride]  # the pairs it would keep; a score would do as well


def main(model_name: str | None = None) -> None:
    model, tokenizer = load_model(model_name)
    inputs = tokenizer(TEXT, return_tensors="pt")
    presses = {
        "a function and two presses": MoERouterPress(experts=[large_values, "keydiff", SnapKVPress(window_size=16)]),
        "a subclass": StridePress(experts=["every_2", "every_3", "selective"]),
    }
    for name, press in presses.items():
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model(**inputs, past_key_values=cache)
        print(f"{name}: {inputs.input_ids.shape[1]} tokens, {cache.layers[0].keys.shape[2]} pairs kept per head")
        for index, rate in enumerate(
            press.get_stats()["layer_stats"][0]["expert_compression_stats"]["cache_hit_rates"]
        ):
            print(f"  layer 0, {press.expert_strategies[index]}: hit rate {rate:.2f}")


if __name__ == "__main__":
    main()
