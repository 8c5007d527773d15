"""The press keeps exactly what it promises, in order; one expert alone is that press; like input, like output."""

import copy

import kvpress
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache.prefill import Prefill
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.kvpress_scorers import KVPRESS_EXPERTS
from kvpress_moe.experts.mixing import rank_within_head
from kvpress_moe.experts.registry import NAMED_EXPERTS, named_expert
from tests.tiny import calibrated_routers, lengths, tiny_model

RATIOS = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
LENGTHS = [1, 2, 7, 64, 500, 2048]


def prompt(length, batch=1, seed=0):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def stored(cache):
    """Pairs that each head of each layer holds."""
    (n_stored,) = set(lengths(cache))
    return n_stored


def prefill(model, press, input_ids):
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(input_ids, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def prefills(llama):
    """Recorded prefills whose values carry the position of their token, by (length, batch)."""
    recorded = {}

    def get(length, batch):
        if (length, batch) not in recorded:
            recorded[length, batch] = Prefill(llama, prompt(length, batch))
            for layer in recorded[length, batch].cache.layers:
                layer.values[..., 0] = torch.arange(length)
        return recorded[length, batch]

    return get


@settings(max_examples=120, deadline=None)
@given(
    ratio=st.sampled_from(RATIOS),
    length=st.sampled_from(LENGTHS),
    batch=st.sampled_from([1, 3]),
    num_experts=st.integers(1, 8),
    data=st.data(),
)
def test_exactly_the_promised_pairs_stay_in_original_order_without_duplicates(
    prefills, ratio, length, batch, num_experts, data
):
    top_k = data.draw(st.integers(1, num_experts))
    press = MoERouterPress(num_experts=num_experts, top_k=top_k, compression_ratio=ratio)
    for _ in range(2):  # untrained, then moved by feedback
        for layer in prefills(length, batch).compress(press).layers:
            kept = layer.values[..., 0]  # (B, H, K)
            assert layer.keys.shape[2] == layer.values.shape[2] == compute_n_kept(length, ratio)
            assert (kept.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_ratio_length_and_batch_keeps_the_promised_number(prefills, ratio, length, batch):
    cache = prefills(length, batch).compress(MoERouterPress(compression_ratio=ratio))
    assert {layer.keys.shape[2] for layer in cache.layers} == {compute_n_kept(length, ratio)}


@pytest.mark.parametrize("name", sorted(set(KVPRESS_EXPERTS) - {"observed_attention", "pyramidkv"}))
def test_one_expert_alone_is_that_press_alone_bit_for_bit(llama, name):
    ids = torch.randperm(256)[None, :200]  # no token twice: which of equal scores it keeps, kvpress leaves to topk
    alone = KVPRESS_EXPERTS[name]()
    alone.compression_ratio = 0.5
    seeds = iter(range(100))
    score = alone.score

    def seeded_score(*args):
        torch.manual_seed(next(seeds))  # leverage and compactor draw a sketch; the expert's seed is the layer's index
        return score(*args)

    alone.score = seeded_score
    expected = prefill(llama, alone, ids)
    got = prefill(llama, MoERouterPress(experts=[name]), ids)
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        # the same pairs: ours in the prompt's order, kvpress's in score order
        assert torch.equal(ours.keys.sort(dim=2).values, theirs.keys.sort(dim=2).values)
        assert torch.equal(ours.values.sort(dim=2).values, theirs.values.sort(dim=2).values)


@pytest.fixture(scope="module")
def eager_llama():
    return tiny_model("llama", attn_implementation="eager")


def test_pyramidkv_judges_as_snapkv_does(llama):
    """Its pyramid is a budget per layer, and the budget is ours."""
    pyramid, snap = (prefill(llama, MoERouterPress(experts=[name]), prompt(200)) for name in ("pyramidkv", "snapkv"))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(pyramid.layers, snap.layers, strict=True))


def test_observed_attention_alone_is_that_press_alone(eager_llama):
    expected = prefill(eager_llama, kvpress.ObservedAttentionPress(0.5), prompt(80))
    got = prefill(eager_llama, MoERouterPress(experts=["observed_attention"]), prompt(80))
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys.sort(dim=2).values, theirs.keys.sort(dim=2).values)


class ScoreRecorder(MoERouterPress):
    """Keeps the mixed scores and single experts' scores of every layer."""

    def mix(self, call, routing):
        mixed = super().mix(call, routing)
        singles = [expert.score(call, self.compression_ratio) for expert in self._experts]
        self.__dict__.setdefault("seen", []).append((mixed, singles))
        return mixed


def test_equal_weights_are_the_mean_of_ranks(llama):
    press = ScoreRecorder(experts=["knorm", "keydiff", "snapkv"], top_k=3)
    prefill(llama, press, prompt(150))
    for mixed, singles in press.seen:
        assert_close(mixed, torch.stack([rank_within_head(scores) for scores in singles]).mean(0))


def test_selective_is_snapkv_where_snapkv_can_run(llama):
    selective, snapkv = (
        prefill(llama, MoERouterPress(experts=[name]), prompt(300)) for name in ("selective", "snapkv")
    )
    for ours, theirs in zip(selective.layers, snapkv.layers, strict=True):
        assert_close(ours.keys, theirs.keys)


@pytest.mark.parametrize("experts", [NAMED_EXPERTS, "strong"])
def test_two_calls_from_the_same_state_give_the_same_result(llama, experts):
    press = MoERouterPress(experts=experts)
    first = prefill(llama, press, prompt(300))
    del press.routers  # forgets the feedback of the first call
    second = prefill(llama, press, prompt(300))
    third = prefill(llama, copy.deepcopy(MoERouterPress(experts=experts, cache_aware=False)), prompt(300))
    for caches in (second, third):
        for ours, theirs in zip(first.layers, caches.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)


def test_without_cache_awareness_any_number_of_calls_give_the_same_result(llama):
    press = MoERouterPress(num_experts=8, cache_aware=False)
    first, *others = (prefill(llama, press, prompt(300)) for _ in range(3))
    for other in others:
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(first.layers, other.layers, strict=True))


def routing(press):
    return [layer["router_stats"]["expert_usage_count"] for layer in press.get_stats()["layer_stats"].values()]


def test_routers_built_in_inference_mode_serve_outside_it_too(llama):
    press = MoERouterPress()
    with torch.inference_mode(), press(llama):
        llama(prompt(60), past_key_values=DynamicCache())
    prefill(llama, press, prompt(60))
    assert press.get_stats()["forward_count"] == 2


def test_feedback_moves_the_routing_of_the_next_input(llama):
    press = MoERouterPress()
    prefill(llama, press, prompt(300, seed=1))
    before = routing(press)
    press.reset_stats()
    prefill(llama, press, prompt(300, seed=2))
    assert before == [[150] * 4] * 2
    assert routing(press) != before


def test_trained_routers_route_different_inputs_differently(llama):
    press = MoERouterPress(cache_aware=False)
    press.post_init_from_model(llama)
    for router in press.routers.layers:
        torch.nn.init.normal_(router.up.weight, generator=torch.Generator().manual_seed(0))
    seen = []
    for seed in (1, 2):
        press.reset_stats()
        prefill(llama, press, prompt(300, seed=seed))
        seen.append(routing(press))
    assert seen[0] != seen[1]


def test_the_more_sure_expert_of_two_decides(llama):
    """Weights are used as weights: with nearly all weight on one expert the mixture is that expert."""
    press = MoERouterPress(experts=["knorm", "keydiff"], top_k=2)
    press.post_init_from_model(llama)
    for router in press.routers.layers:
        router.up.bias.data = torch.tensor([-50.0, 50.0])
    ours = prefill(llama, press, prompt(200))
    theirs = prefill(llama, MoERouterPress(experts=["keydiff"]), prompt(200))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(ours.layers, theirs.layers, strict=True))


def test_hit_rates_are_the_share_of_attention_that_falls_on_kept_pairs(eager_llama):
    """Counted once more from the attention matrix that the model itself returns."""
    ids = prompt(200)
    press = MoERouterPress(experts=["keydiff", "knorm"], top_k=1)
    with torch.no_grad():
        full = eager_llama(ids, past_key_values=DynamicCache(), output_attentions=True)
    cache = prefill(eager_llama, press, ids)
    for layer_idx, stats in press.get_stats()["layer_stats"].items():
        attention = full.attentions[layer_idx][:, :, -64:].mean(2).unflatten(1, (2, -1)).mean(2)  # (1, H, S)
        full_keys, kept_keys = full.past_key_values.layers[layer_idx].keys, cache.layers[layer_idx].keys
        for expert in (0, 1):
            hit = mass = 0.0
            for h in range(2):
                kept = {tuple(key.tolist()) for key in kept_keys[0, h]}
                for s in range(
                    4 + expert, 200, 2
                ):  # without the four sinks  # untrained, top_k = 1: even tokens go to expert 0, odd to expert 1
                    mass += attention[0, h, s].item()
                    hit += attention[0, h, s].item() * (tuple(full_keys[0, h, s].tolist()) in kept)
            assert stats["expert_compression_stats"]["cache_hit_rates"][expert] == pytest.approx(hit / mass, rel=1e-4)


def test_statistics_add_up(llama):
    press = MoERouterPress(num_experts=8, top_k=3)
    for seed in range(3):
        prefill(llama, press, prompt(100, batch=2, seed=seed))
    stats = press.get_stats()
    assert stats["forward_count"] == 3
    assert stats["avg_aux_loss"] * 3 * 2 == pytest.approx(stats["total_aux_loss"])
    for layer in stats["layer_stats"].values():
        router, experts = layer["router_stats"], layer["expert_compression_stats"]
        assert router["total_tokens"] == 3 * 2 * 100
        assert sum(router["expert_usage_count"]) == 3 * 2 * 100 * 3
        assert sum(router["expert_usage_ratios"]) == pytest.approx(1)
        assert max(experts["expert_usage"]) == 3
        pairs = [count * 2 for count in router["expert_usage_count"]]  # two KV heads
        evicted = sum(p * r for p, r in zip(pairs, experts["compression_ratios"], strict=True))
        assert evicted == pytest.approx(0.5 * sum(pairs))  # every pair has three judges
        assert all(0 < rate < 1 for rate in experts["cache_hit_rates"])
    press.reset_stats()
    assert press.get_stats() == {"total_aux_loss": 0, "avg_aux_loss": 0.0, "forward_count": 0, "layer_stats": {}}


def test_without_a_ratio_the_experts_own_fractions_decide(llama):
    for name, keep in {"aggressive": 0.3, "moderate": 0.5, "conservative": 0.8, "ultra_aggressive": 0.15}.items():
        cache = prefill(llama, MoERouterPress(experts=[name], compression_ratio=None), prompt(400))
        assert stored(cache) == int(400 * keep)
    both = MoERouterPress(experts=["aggressive", "conservative"], compression_ratio=None, top_k=1)
    assert stored(prefill(llama, both, prompt(400))) == 220  # half of the tokens each: (0.3 + 0.8) / 2


def test_without_a_ratio_all_layers_keep_as_many_pairs_even_when_feedback_has_moved_them_apart(llama):
    press = MoERouterPress(compression_ratio=None)
    lengths = set()
    for seed in range(4):
        cache = prefill(llama, press, prompt(300, seed=seed))
        lengths.add(len({layer.keys.shape[2] for layer in cache.layers}))
    assert lengths == {1}


def test_scorers_that_depend_on_the_ratio_are_told_it_and_keep_their_own(llama):
    streaming = kvpress.StreamingLLMPress(compression_ratio=0.1)
    ours = prefill(llama, MoERouterPress(experts=[streaming], compression_ratio=0.6), prompt(100))
    theirs = prefill(llama, kvpress.StreamingLLMPress(compression_ratio=0.6), prompt(100))
    assert torch.equal(ours.layers[0].keys.sort(2).values, theirs.layers[0].keys.sort(2).values)
    assert streaming.compression_ratio == 0.1


def test_a_function_is_an_expert(llama):
    def newest(module, hidden_states, keys, values, attentions, kwargs):
        return torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()

    press = MoERouterPress(experts=[newest], compression_ratio=0.9)
    full = Prefill(llama, prompt(50))
    assert torch.equal(full.compress(press).layers[0].keys, full.cache.layers[0].keys[:, :, -compute_n_kept(50, 0.9) :])
    assert dict(press.expert_strategies) == {0: "newest"}


def test_the_recorded_prefill_gives_the_cache_that_the_hooked_press_leaves(llama):
    recorded = Prefill(llama, prompt(200))
    for press in (MoERouterPress(), MoERouterPress(experts="strong"), kvpress.ExpectedAttentionPress(0.4)):
        hooked = prefill(llama, copy.deepcopy(press), prompt(200))
        for ours, theirs in zip(recorded.compress(press).layers, hooked.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_random_sketches_are_the_same_at_every_call_and_leave_the_global_generator_alone(llama):
    press = MoERouterPress(experts=[kvpress.LeverageScorePress(sketch_dimension=2)])
    state = torch.random.get_rng_state()
    first = prefill(llama, press, prompt(200))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    second = prefill(llama, press, prompt(200))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(first.layers, second.layers, strict=True))


def test_experts_share_one_projection_of_the_queries(llama, monkeypatch):
    projected = []
    attention = llama.model.layers[0].self_attn
    recorded = Prefill(llama, prompt(100))
    handle = attention.q_proj.register_forward_hook(lambda module, args, output: projected.append(args[0].shape[1]))
    recorded.compress(MoERouterPress(experts=["expected_attention", "cap", "non_causal"], top_k=3))
    handle.remove()
    # EA and Cap skip 4 sinks and slice what was projected once; the hit rates' window of 50 queries is a slice too
    assert projected == [100]


def test_short_prompts_are_judged_by_windows_cut_to_half(llama):
    """SnapKV asserts more than 64 tokens, ExpectedAttention more than 4: as experts they judge any length."""
    for name in set(KVPRESS_EXPERTS) - {"observed_attention"}:
        for length in (1, 2, 3, 5, 30):
            cache = prefill(llama, MoERouterPress(experts=[name, "knorm"]), prompt(length))
            assert stored(cache) == compute_n_kept(length, 0.5), name


def test_settings_stay_settable(llama):
    press = MoERouterPress()
    press.compression_ratio = 0.8
    assert stored(prefill(llama, press, prompt(100))) == compute_n_kept(100, 0.8)
    press.compression_ratio = 0.5
    press.num_experts = 6
    assert list(press.expert_strategies.values()) == list(NAMED_EXPERTS[:6])
    prefill(llama, press, prompt(100))
    assert len(press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]) == 6
    press.router_type = "base"
    prefill(llama, press, prompt(100))
    press.experts = ["knorm", "tova", "cur"]
    assert press.num_experts == 3
    press.top_k = 3
    prefill(llama, press, prompt(100))
    assert press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"] == [100] * 3


def test_named_experts_are_fresh_objects():
    assert named_expert("knorm").scorer is not named_expert("knorm").scorer


@pytest.mark.parametrize("change", ["del press.routers", "press.num_experts = 2", "press.router_type = 'base'"])
def test_routers_that_are_dropped_inside_the_block_are_built_anew_for_the_next_prompt(llama, change):
    press = MoERouterPress(0.5)
    with press(llama), torch.no_grad():
        exec(change)
        cache = DynamicCache()
        llama.model(input_ids=prompt(40), past_key_values=cache)
    assert lengths(cache) == [20, 20]
    assert press.get_stats()["forward_count"] == 1


def test_experts_are_not_asked_on_behalf_of_a_learned_one_that_no_token_chose(llama, monkeypatch):
    routers = calibrated_routers(llama)  # learned, keydiff, cur
    with torch.no_grad():
        for router in routers.layers:
            router.up.weight.zero_()
            router.up.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    asked, score = set(), Expert.score
    monkeypatch.setattr(Expert, "score", lambda self, *args: (asked.add(self.name), score(self, *args))[1])
    prefill(llama, MoERouterPress(0.5, router=routers, top_k=1, capacity_factor=3.0), prompt(40))
    assert asked == {"keydiff"}


def test_where_a_fifth_of_the_mean_is_few_pairs_a_head_keeps_twice_as_many(llama):
    """300 tokens, a tenth stays: 29 pairs of a head on average. A fifth of it would be 5."""
    press = MoERouterPress(0.9, router=calibrated_routers(llama))
    kept = [n for layer in prefill(llama, press, prompt(300)).layers for n in layer.lengths[0]]
    assert sum(kept) == 29 * len(kept)
    assert min(kept) == 11
