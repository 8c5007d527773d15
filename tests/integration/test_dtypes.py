"""
float32, bfloat16 and float16, eager and SDPA attention: the same number of pairs stays, the statistics are numbers,
and in float32 both kinds of attention lead to the same choice.
"""

import math

import pytest
import torch
from kvpress.utils import compute_n_kept
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from tests.tiny import FAMILIES, kept_positions, lengths, overlap, prefill, tiny_model, tokens

PROMPT, RATIO = 128, 0.6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUIDE = ("aggressive", "moderate", "conservative", "selective", "semantic_aware", "temporal_aware", "adaptive")


@pytest.fixture(scope="module", params=[(d, a) for a in ("eager", "sdpa") for d in DTYPES], ids=str)
def llama_of(request):
    dtype, attention = request.param
    return tiny_model("llama", dtype=dtype, attn_implementation=attention)


def is_share(number):
    return 0 <= number <= 1


@pytest.mark.parametrize("experts", [None, GUIDE, "strong", ("expected_attention", "snapkv", "tova", "cap")], ids=str)
def test_prefill_keeps_the_exact_number_of_pairs_and_counts_numbers(llama_of, experts):
    press = MoERouterPress(compression_ratio=RATIO, experts=experts)
    cache = prefill(llama_of, tokens(PROMPT, 2), press)
    assert lengths(cache) == [compute_n_kept(PROMPT, RATIO)] * 2
    assert {layer.keys.dtype for layer in cache.layers} == {llama_of.dtype}
    assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers)

    stats = press.get_stats()
    assert math.isfinite(stats["total_aux_loss"])
    for layer in stats["layer_stats"].values():
        experts_of_layer = layer["expert_compression_stats"]
        assert sum(layer["router_stats"]["expert_usage_ratios"]) == pytest.approx(1)
        assert all(map(is_share, experts_of_layer["cache_hit_rates"]))  # every expert judged tokens here
        assert all(map(is_share, experts_of_layer["compression_ratios"]))


def test_generation_runs(llama_of):
    cache = DynamicCache()
    with MoERouterPress()(llama_of):
        output = llama_of.generate(tokens(PROMPT, 2), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert output.shape == (2, PROMPT + 4)
    assert lengths(cache) == [PROMPT // 2 + 3] * 2


def test_routing_again_works_in_every_dtype(llama_of):
    """The second prompt is routed by the hit rates of the first: running averages stay float32."""
    press = MoERouterPress()
    for _ in range(2):
        prefill(llama_of, tokens(PROMPT), press)
    for router in press.routers.layers:
        assert router.hit_rate.dtype == torch.float32
        assert bool(router.hit_rate.isfinite().all())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # SDPA leaves its cap out
def test_eager_and_sdpa_attention_lead_to_the_same_choice(family):
    press = MoERouterPress(compression_ratio=RATIO, cache_aware=False)
    choices = []
    no_cap = {"attn_logit_softcapping": None} if family == "gemma2" else {}  # SDPA leaves it out
    for attention in ("eager", "sdpa"):
        model = tiny_model(family, attn_implementation=attention, **no_cap)
        full = prefill(model, tokens(PROMPT, 2))
        choices.append(kept_positions(full, prefill(model, tokens(PROMPT, 2), press)))
    for eager, sdpa in zip(*choices, strict=True):
        assert overlap(eager, sdpa) >= 0.99  # a tie of floats may fall either way
