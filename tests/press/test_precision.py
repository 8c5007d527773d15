"""precision: a byte budget for the press, statistics by strategy, and refusals by name where codes cannot be stored."""

import copy

import kvpress
import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache import PackedLayer
from kvpress_moe.codes.precision import WHOLE, Precision
from kvpress_moe.codes.precision_names import ALLOWED, parse_precision
from kvpress_moe.codes.vector_codes import BITS
from kvpress_moe.errors import NotFiniteError, SettingError, UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache
from tests.tiny import calibrated_routers, decoder, prefill, tiny_model, tokens


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def press(model, **settings) -> MoERouterPress:
    return MoERouterPress(
        **{"compression_ratio": 0.8, "precision": "mixed", "router": calibrated_routers(model), **settings}
    )


def same(one: DynamicCache, other: DynamicCache) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(one.layers, other.layers, strict=True)
        for a, b in zip(x.tensors, y.tensors, strict=True)
    )


def test_the_setting_is_checked_when_it_is_set_and_stays_settable(llama):
    with pytest.raises(SettingError, match="precision: got"):
        MoERouterPress(precision="best")
    made = press(llama)
    with pytest.raises(SettingError, match="precision"):
        made.precision = [(9, 9)]
    assert made.precision == "mixed"
    made.precision = [(8, 4)]
    assert made.menu == (Precision(8, 4),)
    made.precision = None
    assert not any(isinstance(layer, PackedLayer) for layer in prefill(llama, tokens(60), made).layers)


@pytest.mark.parametrize("settings", [{"track_misses": True, "budget": "uniform"}])
def test_misses_cannot_be_tracked_in_codes(llama, settings):
    with pytest.raises(SettingError, match="track_misses: got True, expected False with a precision"):
        MoERouterPress(precision="mixed", **settings)
    made = MoERouterPress(**settings)
    with pytest.raises(SettingError, match="track_misses"):
        made.precision = "mixed"


def test_statistics_count_pairs_and_bytes_of_each_strategy(llama):
    made = press(llama, budget="global", compression_ratio=0.9)
    cache = prefill(llama, tokens(150), made)
    for layer_idx, stats in made.get_stats()["layer_stats"].items():
        counted, layer = stats["strategy_stats"], cache.layers[layer_idx]
        stored = {str(tier.precision): sum(map(sum, tier.lengths)) for tier in layer.tiers}
        assert {name: c["pairs"] for name, c in counted.items() if c["pairs"] and name != "evict"} == stored
        assert sum(c["pairs"] for c in counted.values()) == 2 * 150
        assert sum(c["bytes"] for c in counted.values()) == layer.nbytes - 4 * 2 * len(layer.tiers)
        for what in ("usage_ratio", "attention_ratio"):
            assert sum(c[what] for c in counted.values()) == pytest.approx(1)
        assert counted["evict"]["usage_ratio"] == counted["evict"]["pairs"] / 300
        lost = [c["mean_distortion"] for c in counted.values() if c["pairs"]]
        assert lost == sorted(lost, reverse=True)
        assert counted["evict"]["mean_distortion"] == pytest.approx(1)


def test_one_precision_for_all_kept_pairs(llama):
    cache = prefill(llama, tokens(150), press(llama, precision=[(8, 4)], budget="global"))
    assert {str(tier.precision) for layer in cache.layers for tier in layer.tiers} == {"K8V4"}


def test_ratio_0_codes_everything_if_nothing_may_stay_whole(llama):
    input_ids = tokens(80)
    cache = prefill(llama, input_ids, press(llama, precision=[(8, 8)], compression_ratio=0.0))
    assert all(sum(map(sum, layer.lengths)) == 2 * 80 for layer in cache.layers)
    whole = prefill(llama, input_ids, press(llama, compression_ratio=0.0))
    assert not any(isinstance(layer, PackedLayer) for layer in whole.layers)


@pytest.mark.parametrize("settings", [{"router": None, "experts": "guide"}, {"router": None, "experts": ["knorm"]}])
@pytest.mark.parametrize("ratio", [0.7, None])
def test_untrained_routers_follow_the_rule_with_ranks(llama, settings, ratio):
    input_ids = tokens(200)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefill(llama, input_ids).layers)
    made = MoERouterPress(ratio, precision="mixed", **settings)
    assert made.scope == "uniform"
    cache = prefill(llama, input_ids, made)
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    if ratio is not None:
        assert sum(layer.nbytes for layer in cache.layers) <= full * 0.3


def test_a_prompt_too_short_for_its_budget_keeps_a_pair_in_each_head(llama):
    cache = prefill(llama, tokens(3), press(llama, compression_ratio=0.95, budget="global"))
    assert all(length >= 1 for layer in cache.layers for heads in layer.lengths for length in heads)


def test_the_press_compresses_the_same_again(llama):
    made = press(llama, budget="global", cache_aware=False)
    assert same(prefill(llama, tokens(120), made), prefill(llama, tokens(120), made))
    assert same(prefill(llama, tokens(120), made), prefill(llama, tokens(120), copy.deepcopy(made)))


def test_wrappers_eager_attention_and_other_caches_are_refused_by_name(llama):
    input_ids = tokens(60)
    with pytest.raises(SettingError, match="precision: got 'mixed', expected None inside a kvpress wrapper"):
        prefill(llama, input_ids, kvpress.ChunkPress(press(llama), chunk_length=20))
    eager = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(SettingError, match="precision: got 'mixed', expected None with eager attention"):
        prefill(eager, input_ids, press(eager))
    static = StaticCache(config=llama.config, max_cache_len=100)
    with pytest.raises(UnsupportedInputError, match="StaticCache"):
        prefill(llama, input_ids, press(llama), static)
    for layer in decoder(llama).layers:
        assert not layer.self_attn._forward_hooks


def test_a_model_whose_heads_fill_no_whole_bytes_is_refused_and_left_as_it_was():
    model = tiny_model("llama", head_dim=12)
    with pytest.raises(ValueError, match="head_dim: got 12, expected a multiple of 8"):
        prefill(model, tokens(60), press(model))
    assert not decoder(model).layers[0].self_attn._forward_hooks


def test_values_that_are_not_finite_are_refused_before_anything_is_coded(llama):
    model, cache = copy.deepcopy(llama), DynamicCache()
    decoder(model).layers[1].self_attn.v_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NotFiniteError), press(model, budget="global")(model), torch.no_grad():
        model.model(tokens(60), **with_cache(cache))
    assert not any(isinstance(layer, PackedLayer) for layer in cache.layers)


def test_the_pipeline_answers_two_questions_from_a_packed_cache(llama, tokenizer):
    pipe = kvpress.KVPressTextGenerationPipeline(model=llama, tokenizer=tokenizer)
    made = press(llama, budget="global", cache_aware=False)
    questions = ["What?", "Who?"]
    both = pipe("Some text. " * 20, questions=questions, press=made, max_new_tokens=4)["answers"]
    alone = [pipe("Some text. " * 20, question=q, press=made, max_new_tokens=4)["answer"] for q in questions]
    assert both == alone


def transformed(model):
    """Calibrated routers with key transforms."""
    from tests.codes.test_codes import basis_of

    routers, config = calibrated_routers(model), model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    routers.key_transforms = {
        layer_idx: basis_of(1, head_dim, config.num_key_value_heads).transform
        for layer_idx in range(config.num_hidden_layers)
    }
    return routers


@pytest.mark.parametrize("with_transforms", [False, True])
def test_autocast_does_not_round_what_is_coded(llama, with_transforms):
    from tests.codes.test_codes import basis_of, keys_like

    basis = basis_of(5000)
    keys, strategies = keys_like(basis, 5000), torch.ones(1, 2, 5000)
    menu = [Precision(4, 4)]
    made = PackedLayer.from_strategies(keys, keys, strategies, menu, basis if with_transforms else None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = PackedLayer.from_strategies(keys, keys, strategies, menu, basis if with_transforms else None)
        again.reorder_cache(torch.tensor([0]))
        prefill(llama, tokens(5000), press(llama, router=transformed(llama) if with_transforms else None))
    for ours, theirs in zip(made.tensors, again.tensors, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("with_transforms", [False, True])
def test_inference_mode_and_gradients_leave_nothing_behind(with_transforms):
    model = tiny_model("llama", head_dim=24)  # a rotation that no other test has made
    made = press(
        model, router=transformed(model) if with_transforms else None, experts=None if with_transforms else ["keydiff"]
    )
    with torch.inference_mode(), made(model):
        model.model(tokens(60), **with_cache(DynamicCache()))
    cache = DynamicCache()
    with made(model):
        model.model(tokens(60), **with_cache(cache))  # gradients are on, as they are by default
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors[:-2])
    copy.deepcopy(cache)


def test_wrappers_that_call_compress_are_refused_too(llama):
    made = press(llama, budget="global", router=None, experts=["keydiff"])
    for wrapper in (
        kvpress.ComposedPress([kvpress.KnormPress(0.5), made]),
        kvpress.PerLayerCompressionPress(made, [0.2, 0.8]),
    ):
        with pytest.raises(SettingError, match="precision: got .*expected None inside a kvpress wrapper"):
            prefill(llama, tokens(60), wrapper)


def test_attention_that_becomes_eager_inside_the_block_is_refused():
    model = tiny_model("llama")
    with press(model)(model), torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(SettingError, match="precision: got 'mixed', expected None with eager attention"):
            model(tokens(60))


def test_key_transforms_of_other_heads_or_layers_are_refused_before_the_prefill(llama):
    from kvpress_moe.errors import CheckpointError
    from tests.codes.test_codes import basis_of

    for transforms in ({0: basis_of(1, 8, 2).transform}, dict.fromkeys(range(2), basis_of(1, 64, 2).transform)):
        routers = calibrated_routers(llama)
        routers.key_transforms = transforms
        with pytest.raises(CheckpointError, match="key transforms of .* expected all 2 layers .*Fit them again"):
            prefill(llama, tokens(60), press(llama, router=routers))


def test_an_iterator_of_precisions_is_read_once():
    made = MoERouterPress(experts=["keydiff"], precision=([8, 4] for _ in range(1)))
    assert made.precision == ((8, 4),)
    assert made.menu == (Precision(8, 4),)


def test_copies_of_a_cache_share_the_key_transforms(llama):
    cache = prefill(llama, tokens(80), press(llama, router=transformed(llama)))
    assert copy.deepcopy(cache).layers[0].basis.transform is cache.layers[0].basis.transform


def test_the_command_line_knows_the_bits_that_the_press_knows():
    """Its module imports no PyTorch, so it has a list of its own."""
    assert (*BITS, WHOLE) == ALLOWED
    assert parse_precision("k8v4, K16V16") == [(8, 4), (16, 16)]
