"""NaN and infinity never decide which pairs stay: the error names stage and layer, and the prompt leaves nothing."""

import pytest
import torch
from kvpress import AdaKVPress, ChunkPress
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import ExpertError, MoERouterPress, NotFiniteError
from kvpress_moe.press.nan_checks import is_finite
from tests.press.test_exclusive_use import kept
from tests.tiny import calibrated_routers, decoder, prefill, tiny_model, tokens

PROMPT = tokens(50, seed=1)
LAYER, TOKEN = 1, 48


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=3)


def spoil(value, token=TOKEN):
    """A forward hook that makes one number of one token ``value``."""

    def hook(module, args, output):
        output = output.clone()
        output[0, token, 3] = value
        return output

    return hook


def presses(llama):
    return {
        "uniform": MoERouterPress(0.5, num_experts=3),
        "one expert": MoERouterPress(0.5, experts=["moderate"]),  # a window: looks at positions alone
        "own fractions": MoERouterPress(None, num_experts=4),
        "layer": MoERouterPress(0.5, router=calibrated_routers(llama), budget="layer"),
        "global": MoERouterPress(0.5, router=calibrated_routers(llama), budget="global"),
        "tracked": MoERouterPress(0.5, num_experts=2, track_misses=True),
    }


@pytest.mark.parametrize("name", ["uniform", "one expert", "own fractions", "layer", "global", "tracked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("stage", "module"),
    [("hidden states", "input_layernorm"), ("keys", "self_attn.k_proj"), ("values", "self_attn.v_proj")],
)
def test_what_the_model_gives_is_checked_before_any_expert_judges_it(llama, stage, module, value, name):
    press, untouched = presses(llama)[name], presses(llama)[name]
    hook = decoder(llama).layers[LAYER].get_submodule(module).register_forward_hook(spoil(value))
    cache = DynamicCache()
    with pytest.raises(NotFiniteError, match=rf"^{stage}: got NaN or infinity on layer {LAYER} \(\d+ of \d+ "):
        prefill(llama, PROMPT, press, cache)
    hook.remove()
    assert cache.get_seq_length() == 0
    assert press.get_stats()["forward_count"] == 0
    assert not decoder(llama).layers[LAYER].self_attn._forward_hooks
    assert kept(prefill(llama, PROMPT, press, cache)) == kept(prefill(llama, PROMPT, untouched))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["uniform", "global"])
def test_queries_that_overflow_are_seen_in_the_attention_that_hit_rates_are_made_of(llama, value, name):
    experts = ("keydiff", "cur")
    settings = {"router": calibrated_routers(llama, experts)} if name == "global" else {"experts": experts}
    press = MoERouterPress(0.5, **settings)
    hook = decoder(llama).layers[LAYER].self_attn.q_proj.register_forward_hook(spoil(value))
    with pytest.raises(NotFiniteError, match=f"^attention: got NaN or infinity on layer {LAYER} .*float32"):
        prefill(llama, PROMPT, press)
    hook.remove()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("stage", "parameter"),
    [
        ("router logits", "up.bias"),
        ("router logits", "adjust.weight"),
        ("mixed scores", "calibration.slope"),
        ("mixed scores", "calibration.tail"),
        ("mixed scores", "calibration.offset"),
    ],
)
def test_broken_routers_are_told_from_broken_models(llama, stage, parameter, value):
    routers = calibrated_routers(llama)
    with torch.no_grad():
        routers.layers[LAYER].get_parameter(parameter).fill_(value)
    for budget in ("uniform", "global"):
        press = MoERouterPress(0.5, router=routers, budget=budget)
        with pytest.raises(NotFiniteError, match=f"^{stage}: got NaN or infinity on layer {LAYER} .*load or train it"):
            prefill(llama, PROMPT, press)


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_an_expert_that_says_nan_is_named_with_its_layer(llama, budget):
    def unsure(module, hidden_states, keys, *others):
        scores = keys.norm(dim=-1)
        scores[..., 7] = torch.nan if module.layer_idx == LAYER else 0
        return scores

    press = MoERouterPress(0.5, experts=[unsure], budget=budget)
    with pytest.raises(ExpertError, match=f"'unsure' scored NaN on layer {LAYER}"):
        prefill(llama, PROMPT, press)
    assert press.get_stats()["forward_count"] == 0


def test_infinity_is_how_an_expert_alone_says_always_and_never(llama):
    def first(module, hidden_states, keys, *others):
        scores = torch.full(keys.shape[:3], -torch.inf)
        scores[..., :25] = torch.inf
        return scores

    full = prefill(llama, PROMPT)
    for budget in ("uniform", "global"):
        cache = prefill(llama, PROMPT, MoERouterPress(0.5, experts=[first], budget=budget))
        expected = [layer.keys[:, :, :25].flatten(0, 2) for layer in full.layers]
        for layer, keys in zip(cache.layers, expected, strict=True):
            assert_close(getattr(layer, "flat_keys", layer.keys).reshape(keys.shape), keys)


@pytest.mark.parametrize("wrap", [AdaKVPress, lambda press: ChunkPress(press, chunk_length=20)])
def test_inside_a_wrapper_too(wrap):
    llama = tiny_model("llama")
    decoder(llama).layers[LAYER].self_attn.v_proj.register_forward_hook(spoil(torch.nan))
    with pytest.raises(NotFiniteError, match=f"^values: got NaN or infinity on layer {LAYER}"):
        prefill(llama, PROMPT, wrap(MoERouterPress(0.5)))


def test_a_generated_token_whose_attention_is_nan_is_refused_where_misses_are_tracked(llama):
    press, cache = MoERouterPress(0.5, num_experts=2, track_misses=True), DynamicCache()
    with torch.no_grad(), press(llama):
        llama.model(PROMPT, past_key_values=cache)
        before = repr(press.get_stats())
        hook = decoder(llama).layers[LAYER].self_attn.q_proj.register_forward_hook(spoil(torch.nan, token=0))
        with pytest.raises(NotFiniteError, match=f"^attention: got NaN or infinity on layer {LAYER}"):
            llama.model(tokens(1), past_key_values=cache)
        hook.remove()
    assert repr(press.get_stats()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_among_many_is_found_in_any_dtype_and_layout(dtype, value):
    states = torch.randn(2, 3, 70, 8).to(dtype)
    for place in (0, -1, 1234):
        spoiled = states.clone()
        spoiled.view(-1)[place] = value
        assert not is_finite(spoiled)
        assert not is_finite(spoiled.transpose(1, 2))
    assert is_finite(states)
    assert is_finite(torch.full((1, 1), torch.finfo(dtype).max, dtype=dtype))
