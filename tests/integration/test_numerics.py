"""What is kept does not depend on the dtype: experiments/numerics.py measures a real model, these tests a tiny one."""

import copy

import pytest
import torch

from experiments.numerics import WatchedPress, compare, kept_pairs, prefill, share_kept
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.registry import named_expert
from tests.tiny import distinct_tokens, tiny_model

PROMPT = 250


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["keydiff", "cur", "knorm", "semantic_aware"])
def test_pairs_are_judged_in_float32_whatever_they_are_stored_in(llama, name, dtype):
    """Keys of real models have much in common; cosines of 8 bits would not tell them apart."""
    module = llama.model.layers[0].self_attn
    pairs = (torch.randn(2, 1, 2, 100, 8) + 3).to(dtype)  # keys and values
    scores = [
        named_expert(name).score(LayerCall(module, torch.zeros(1, 100, 32), *some, None, {}), 0.5)
        for some in (pairs, pairs.float())
    ]
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [None, ["keydiff"], ["cur"], ["knorm"], ["tova"]], ids=str)
def test_half_precision_keeps_the_pairs_that_float32_keeps(dtype, experts):
    """As they come from the model: its own rounding is no matter of the press. Cosines of 8 bits would be."""
    model = tiny_model("llama", hidden_size=128)
    calls, cache = prefill(model, distinct_tokens(PROMPT))

    def kept(some, dtype):
        return kept_pairs(some, WatchedPress(experts=experts, cache_aware=False), calls, cache, dtype)

    half = copy.deepcopy(model).to(dtype)
    assert share_kept(kept(half, dtype), kept(model, torch.float32)) >= 0.99


def test_the_benchmark_compares_all_presses_in_both_dtypes(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("experiments.numerics.PRESSES", {"guide": lambda ratio: WatchedPress(ratio, cache_aware=False)})
    rows = compare(model, distinct_tokens(60))
    assert [(row["dtype"], row["ratio"]) for row in rows] == [
        (dtype, ratio) for dtype in ("bfloat16", "float16") for ratio in (0.5, 0.75, 0.9)
    ]
    assert all(0.5 < row["model"] <= 1 and 0.5 < row["stages"] <= 1 for row in rows)
