"""One test per statement of the user guide, named after the statement."""

import importlib
import math
import subprocess
import sys

import kvpress
import pytest
import torch
from kvpress.utils import compute_n_kept

from kvpress_moe import BaseMoERouter, MoERouterPress, PiKVMoERouter
from kvpress_moe.experts.registry import NAMED_EXPERTS
from kvpress_moe.experts.windows import rule_by_length
from tests.tiny import lengths, prefill, tiny_model, tokens


def positions(model, press, n_tokens):
    """Positions that head 0 of the last layer keeps."""
    full, kept = (prefill(model, tokens(n_tokens), p).layers[-1].keys[0, 0] for p in (None, press))
    return (kept[:, None] == full).all(-1).float().argmax(-1).tolist()


def counts(press):
    return [layer["router_stats"]["expert_usage_count"] for layer in press.get_stats()["layer_stats"].values()]


# ── overview and features ────────────────────────────────────────────────────────────────────────────────────────────


def test_multi_expert_routing_uses_four_experts_each_with_its_own_strategy(llama):
    press = MoERouterPress()
    prefill(llama, tokens(200), press)
    assert dict(press.expert_strategies) == {0: "aggressive", 1: "moderate", 2: "conservative", 3: "selective"}
    assert all(all(count > 0 for count in layer) for layer in counts(press))


def test_each_layer_has_a_router_of_its_own(llama):
    press = MoERouterPress()
    press.post_init_from_model(llama)
    assert len(press.routers.layers) == llama.config.num_hidden_layers
    with torch.no_grad():
        press.routers.layers[0].up.bias += torch.tensor([9.0, 0, 0, 0])
    prefill(llama, tokens(200), press)
    first, second = counts(press)
    assert first[0] > second[0]


def test_the_pikv_router_adjusts_its_decisions_to_the_use_of_the_cache(llama):
    press = MoERouterPress(router_type="pikv", cache_aware=True)
    prefill(llama, tokens(200), press)
    rates = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["cache_hit_rates"]
    press.reset_stats()
    prefill(llama, tokens(200), press)
    usage = counts(press)[0]
    assert usage[rates.index(max(rates))] > usage[rates.index(min(rates))]


def test_load_is_balanced_no_expert_takes_more_than_its_capacity(llama):
    press = MoERouterPress(top_k=1, capacity_factor=1.0)
    press.post_init_from_model(llama)
    for router in press.routers.layers:
        torch.nn.init.constant_(router.up.bias[0], 20.0)  # everybody wants expert 0
    prefill(llama, tokens(200), press)
    assert counts(press) == [[50] * 4] * 2


# ── expert strategies ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expert", "first", "last"), [("aggressive", 0.2, 0.1), ("moderate", 0.3, 0.2), ("conservative", 0.5, 0.3)]
)
def test_a_window_expert_keeps_the_first_and_the_last_tokens(llama, expert, first, last):
    kept = positions(llama, MoERouterPress(experts=[expert], compression_ratio=None), 200)
    assert kept == [*range(round(200 * first)), *range(200 - round(200 * last), 200)]


def test_the_selective_expert_keeps_what_the_latest_queries_attend_to(llama):
    kept = positions(llama, MoERouterPress(experts=["selective"]), 300)
    snapkv = positions(llama, kvpress.SnapKVPress(0.5), 300)
    assert sorted(kept) == sorted(snapkv)


def test_a_windows_budget_shrinks_and_grows_in_proportion(llama):
    for ratio, n_first, n_last in ((0.7, 40, 20), (0.85, 20, 10), (0.4, 80, 40)):
        kept = positions(llama, MoERouterPress(experts=["aggressive"], compression_ratio=ratio), 200)
        assert abs(sum(position < 100 for position in kept) - n_first) <= 1
        assert abs(sum(position >= 100 for position in kept) - n_last) <= 1


# ── basic use ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_importing_auto_adds_the_press_to_kvpress_and_importing_the_package_does_not():
    program = """
import sys, kvpress_moe
assert "torch" not in sys.modules and "kvpress" not in sys.modules
from kvpress_moe import MoERouterPress
import kvpress
assert not hasattr(kvpress, "MoERouterPress")
import kvpress_moe.auto
from kvpress.presses import MoERouterPress as from_presses, BaseMoERouter, PiKVMoERouter
from kvpress import MoERouterPress as from_kvpress
assert from_presses is from_kvpress is MoERouterPress
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_the_guides_eight_settings_have_the_guides_defaults():
    press = MoERouterPress()
    guide = MoERouterPress(
        num_experts=4,
        top_k=2,
        capacity_factor=1.5,
        dropout=0.1,
        router_type="pikv",
        cache_aware=True,
        compression_ratio=0.5,
        aux_loss_weight=0.01,
    )
    assert press == guide
    assert isinstance(press, kvpress.ScorerPress)


def test_stats_hold_plain_numbers_under_the_guides_names(llama):
    press = MoERouterPress()
    prefill(llama, tokens(200), press)
    stats = press.get_stats()
    assert stats["total_aux_loss"] == pytest.approx(2 * 0.25)  # two layers, perfectly balanced: 1 / E each
    assert stats["avg_aux_loss"] == pytest.approx(0.25)
    assert stats["forward_count"] == 1
    for layer_idx in (0, 1):
        layer = stats["layer_stats"][layer_idx]
        assert layer["router_stats"] == {
            "expert_usage_ratios": [0.25] * 4,
            "expert_usage_count": [100] * 4,
            "total_tokens": 200,
        }
        experts = layer["expert_compression_stats"]
        assert experts["expert_usage"] == [1] * 4
        for name in ("compression_ratios", "cache_hit_rates"):
            assert all(type(number) is float and 0 <= number <= 1 for number in experts[name])


# ── advanced configuration ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("router_type", "router_class"), [("base", BaseMoERouter), ("pikv", PiKVMoERouter)])
def test_two_router_types_are_supported(llama, router_type, router_class):
    press = MoERouterPress(router_type=router_type)
    prefill(llama, tokens(100), press)
    assert {type(router) for router in press.routers.layers} == {router_class}


class Custom(MoERouterPress):
    """The guide's subclass, with strategies of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.asked = []
        self.expert_strategies = {0: "newest", 1: "semantic_aware", 2: "every_other", 3: "adaptive"}

    def _apply_expert_compression(self, keys, values, strategy, router_probs):
        self.asked.append((strategy, tuple(router_probs.shape)))
        if strategy == "newest":
            return torch.arange(keys.shape[2]).float().expand(keys.shape[:3])
        return keys[:, :, ::2], values[:, :, ::2]


def test_a_subclass_adds_strategies_and_is_asked_for_names_the_table_does_not_hold(llama):
    press = Custom()
    prefill(llama, tokens(120), press)
    assert set(press.asked) == {("newest", (1, 120, 4)), ("every_other", (1, 120, 4))}
    assert lengths(prefill(llama, tokens(120), press)) == [60, 60]


def test_a_custom_expert_may_return_a_score_or_the_pairs_it_keeps(llama):
    newest, every_other = Custom(top_k=1), Custom(top_k=1)
    newest.expert_strategies = dict.fromkeys(range(4), "newest")
    every_other.expert_strategies = dict.fromkeys(range(4), "every_other")
    assert positions(llama, newest, 120) == list(range(60, 120))
    assert positions(llama, every_other, 120) == list(range(0, 120, 2))


def test_without_a_subclass_unknown_names_are_refused():
    with pytest.raises(ValueError, match="newest"):
        MoERouterPress().expert_strategies[0] = "newest"


# ── performance ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_num_experts_takes_the_first_of_the_table():
    for num_experts in (2, 8):
        press = MoERouterPress(num_experts=num_experts)
        assert tuple(press.expert_strategies.values()) == NAMED_EXPERTS[:num_experts]


@pytest.mark.parametrize("capacity_factor", [1.0, 1.5, 2.0])
def test_the_capacity_factor_bounds_the_tokens_of_an_expert(llama, capacity_factor):
    press = MoERouterPress(capacity_factor=capacity_factor)
    press.post_init_from_model(llama)
    for router in press.routers.layers:
        torch.nn.init.constant_(router.up.bias[:1], 20.0)
    prefill(llama, tokens(200), press)
    assert counts(press)[0][0] == math.ceil(capacity_factor * 200 * 2 / 4)


def test_the_weight_of_the_auxiliary_loss_acts_in_training_only(llama):
    kept = [positions(llama, MoERouterPress(aux_loss_weight=weight), 200) for weight in (0.1, 0.001)]
    assert kept[0] == kept[1]


def test_routing_to_one_expert_is_possible(llama):
    press = MoERouterPress(top_k=1)
    prefill(llama, tokens(200), press)
    assert [sum(layer) for layer in counts(press)] == [200, 200]


# ── best practice ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi3"])
def test_llama_mistral_qwen_gemma_and_phi_models_are_supported(family):
    model = tiny_model(family)
    cache = prefill(model, tokens(40), MoERouterPress())
    assert 20 in lengths(cache)


@pytest.mark.parametrize(
    ("length", "rule"),
    [(1, "conservative"), (99, "conservative"), (100, "moderate"), (500, "moderate"), (501, "aggressive")],
)
def test_the_length_rule_of_the_adaptive_expert(llama, length, rule):
    assert rule_by_length(length) == rule
    keep = {"conservative": 0.8, "moderate": 0.5, "aggressive": 0.3}[rule]
    cache = prefill(llama, tokens(length), MoERouterPress(experts=["adaptive"], compression_ratio=None))
    assert lengths(cache) == [max(1, int(length * keep))] * 2
    assert positions(llama, MoERouterPress(experts=["adaptive"]), length) == positions(
        llama, MoERouterPress(experts=[rule]), length
    )


def test_resetting_the_statistics_frees_them_and_keeps_the_feedback(llama):
    press = MoERouterPress()
    prefill(llama, tokens(200), press)
    rates = press.routers.layers[0].hit_rate.clone()
    press.reset_stats()
    assert press.get_stats()["layer_stats"] == {}
    assert torch.equal(press.routers.layers[0].hit_rate, rates)


def test_deleting_the_routers_frees_them_and_the_next_use_builds_them_again(llama):
    press = MoERouterPress()
    prefill(llama, tokens(200), press)
    del press.routers
    assert press.routers is None
    prefill(llama, tokens(200), press)
    assert counts(press) == [[200] * 4] * 2  # untrained and without feedback again


# ── troubleshooting ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_higher_compression_ratio_removes_more(llama):
    for ratio in (0.3, 0.5, 0.7):
        assert (
            lengths(prefill(llama, tokens(200), MoERouterPress(compression_ratio=ratio)))
            == [compute_n_kept(200, ratio)] * 2
        )


def test_a_more_aggressive_strategy_can_be_put_in_an_experts_place(llama):
    press = MoERouterPress(compression_ratio=None, num_experts=1)
    press.expert_strategies[0] = "ultra_aggressive"
    assert lengths(prefill(llama, tokens(200), press)) == [30, 30]


# ── technical details ────────────────────────────────────────────────────────────────────────────────────────────────


def test_routing_reads_the_hidden_states(llama):
    press = MoERouterPress(cache_aware=False)
    press.post_init_from_model(llama)
    for router in press.routers.layers:
        torch.nn.init.normal_(router.up.weight, std=5.0, generator=torch.Generator().manual_seed(0))
    seen = []
    for seed in (0, 1):
        press.reset_stats()
        prefill(llama, tokens(200, seed=seed), press)
        seen.append(counts(press))
    assert seen[0] != seen[1]


def test_the_experts_with_the_highest_probability_are_chosen():
    router = BaseMoERouter(8, 4).eval()
    torch.nn.init.normal_(router.up.weight, generator=torch.Generator().manual_seed(0))
    output = router(torch.randn(1, 50, 8), top_k=2, capacity_factor=4.0)
    expected = torch.zeros_like(output.chosen).scatter_(-1, output.probs.topk(2).indices, True)
    assert torch.equal(output.chosen, expected)


def test_the_auxiliary_loss_is_the_sum_of_mean_probability_times_usage():
    router = BaseMoERouter(8, 4).eval()
    torch.nn.init.normal_(router.up.weight, generator=torch.Generator().manual_seed(0))
    output = router(torch.randn(1, 50, 8), top_k=2, capacity_factor=1.5)
    usage = output.chosen.sum((0, 1)) / output.chosen.sum()
    assert output.aux_loss.item() == pytest.approx((output.probs.mean((0, 1)) * usage).sum().item())


def test_hit_rates_of_past_prompts_are_remembered_as_running_averages(llama):
    press = MoERouterPress()
    observed = []
    for seed in range(3):
        press.reset_stats()
        prefill(llama, tokens(200, seed=seed), press)
        observed.append(press.get_stats()["layer_stats"][0]["expert_compression_stats"]["cache_hit_rates"])
    average = observed[0][0]
    for rates in observed[1:]:
        average = 0.9 * average + 0.1 * rates[0]
    assert press.routers.layers[0].hit_rate[0].item() == pytest.approx(average, rel=1e-5)


def test_the_auto_module_can_be_imported_twice():
    importlib.reload(importlib.import_module("kvpress_moe.auto"))
