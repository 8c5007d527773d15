"""While decoding, hits and misses are what a softmax over kept and evicted keys says, counted by expert."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvpress_moe import MoERouterPress
from tests.tiny import kept_positions, prefill, tokens

PROMPT = 60


def decoded(llama, **settings):
    """A press after a prompt and one generated token, with what the attention of layer 1 was called with."""
    press = MoERouterPress(experts=["keydiff", "knorm"], top_k=1, cache_aware=False, **settings)
    cache, calls = DynamicCache(), []
    hook = llama.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with torch.no_grad(), press(llama):
        llama(tokens(PROMPT), past_key_values=cache)
        before = press.get_stats()
        llama(tokens(1, seed=1), past_key_values=cache, position_ids=torch.tensor([[PROMPT]]))
    hook.remove()
    return press, cache, before, calls[-1]


def rates(stats):
    return stats["layer_stats"][1]["expert_compression_stats"]["cache_hit_rates"]


def test_hits_and_misses_of_a_generated_token_equal_a_naive_loop(llama):
    press, cache, before, kwargs = decoded(llama, track_misses=True)
    attention = llama.model.layers[1].self_attn
    full = prefill(llama, tokens(PROMPT))
    kept = kept_positions(full, cut(cache, PROMPT // 2))[1]
    query = attention.q_proj(kwargs["hidden_states"]).view(1, 1, 4, 8).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
    hit, mass = [0.0, 0.0], [0.0, 0.0]
    for head in range(2):
        keys = torch.cat((full.layers[1].keys[0, head], cache.layers[1].keys[0, head, -1:]))  # and the new token's own
        share = (query[0, 2 * head : 2 * head + 2, 0] @ keys.T * attention.scaling).softmax(-1).mean(0)
        for position in range(PROMPT):
            expert = position % 2  # untrained: even tokens to expert 0, odd ones to expert 1
            mass[expert] += share[position].item()
            hit[expert] += share[position].item() * (position in kept[0, head])
    sums = press._feedback.stats._layers[1]
    seen_before = MoERouterPress(experts=["keydiff", "knorm"], top_k=1, cache_aware=False)
    prefill(llama, tokens(PROMPT), seen_before)
    for name, expected in (("hit", hit), ("mass", mass)):
        difference = sums[name] - seen_before._feedback.stats._layers[1][name]
        assert_close(difference, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert rates(press.get_stats()) != rates(before)


def cut(cache, n_pairs):
    """The cache as it was before the last tokens."""
    return DynamicCache([(layer.keys[:, :, :n_pairs], layer.values[:, :, :n_pairs]) for layer in cache.layers])


def test_without_tracking_decoding_counts_nothing(llama):
    press, _, before, _ = decoded(llama)
    assert press.get_stats() == before


@pytest.mark.parametrize("num_beams", [1, 2])
def test_tracking_does_not_change_what_is_generated(llama, num_beams):
    outputs = []
    for track_misses in (False, True):
        with MoERouterPress(cache_aware=False, track_misses=track_misses)(llama):
            outputs.append(llama.generate(tokens(PROMPT, 2), max_new_tokens=6, do_sample=False, num_beams=num_beams))
    assert torch.equal(*outputs)


def test_feedback_of_generated_tokens_reaches_the_router(llama):
    after_prompt, after_tokens = [], []
    for n_new, rate in ((1, after_prompt), (8, after_tokens)):
        press = MoERouterPress(track_misses=True)
        with press(llama):
            llama.generate(tokens(PROMPT), max_new_tokens=n_new, do_sample=False)
        rate.extend(press.routers.layers[1].hit_rate.tolist())
    assert after_prompt != after_tokens


def test_another_cache_is_not_mistaken_for_the_tracked_one(llama):
    press = MoERouterPress(track_misses=True, cache_aware=False)
    prefill(llama, tokens(PROMPT), press)
    before = press.get_stats()
    other = prefill(llama, tokens(PROMPT))
    with torch.no_grad(), press(llama):
        llama(tokens(1), past_key_values=other)
    assert press.get_stats() == before
