"""Experts get the queries and keys that the layer projected itself: nothing is projected twice, and nothing is kept."""

import pickle

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe import MoERouterPress
from kvpress_moe.model.projection_cache import ProjectionCache
from tests.tiny import decoder, prefill, tiny_model, tokens

EXPERTS = ["leverage", "expected_attention", "non_causal"]


def counted_projections(model, press):
    """Calls of each projection of the first layer while a prompt is read."""
    attention = decoder(model).layers[0].self_attn
    names = [name for name in ("q_proj", "k_proj", "qkv_proj") if hasattr(attention, name)]
    counts = dict.fromkeys(names, 0)

    def counting(name):
        def count(module, args, output):
            counts[name] += 1

        return count

    hooks = [getattr(attention, name).register_forward_hook(counting(name)) for name in names]
    prefill(model, tokens(80), press)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_whole_prompts_are_projected_once(family):
    model = tiny_model(family)
    counts = counted_projections(model, MoERouterPress(0.5, experts=EXPERTS, top_k=3))
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_the_same_pairs_stay_as_when_experts_project_themselves(family, monkeypatch):
    model = tiny_model(family)
    shared = prefill(model, tokens(80), MoERouterPress(0.5, experts=EXPERTS, top_k=3))
    monkeypatch.setattr(ProjectionCache, "of", lambda *args: {})
    own = prefill(model, tokens(80), MoERouterPress(0.5, experts=EXPERTS, top_k=3))
    for one, other in zip(shared.layers, own.layers, strict=True):
        assert_close(one.keys, other.keys, rtol=0, atol=0)


def test_nothing_is_held_after_a_prompt_or_an_error(llama):
    press = MoERouterPress(0.5, experts=EXPERTS)
    prefill(llama, tokens(80), press)
    assert press._session.projections._projected == {}

    def fail(*args):
        raise RuntimeError("stop")

    hook = decoder(llama).layers[1].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        prefill(llama, tokens(80), press)
    hook.remove()
    assert press._session.projections._projected == {}
    for layer in decoder(llama).layers:
        assert not layer.self_attn.k_proj._forward_hooks


def test_other_hidden_states_are_projected_anew(llama):
    projections = ProjectionCache()
    attention = decoder(llama).layers[0].self_attn
    hidden_states = torch.randn(1, 5, 32)
    with projections.watch(llama):
        expected = attention.k_proj(hidden_states)
    assert torch.equal(projections.of(attention, hidden_states)["k_proj"], expected)
    assert projections.of(attention, hidden_states.clone()) == {}
    assert projections.of(decoder(llama).layers[1].self_attn, hidden_states) == {}
    assert pickle.loads(pickle.dumps(projections))._projected == {}
    assert not attention.k_proj._forward_hooks
