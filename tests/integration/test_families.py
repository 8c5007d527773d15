"""
Every model family that the press serves: prompts shrink exactly, generation runs, and what is left in the cache
answers a question of several tokens as it answers the same tokens one by one.
"""

import copy
from contextlib import ExitStack

import pytest
import torch
import transformers
from kvpress.utils import compute_n_kept, get_prerope_key_states
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.experts.layer_call import LayerCall, latest_attention
from kvpress_moe.model.attention_view import AttentionView
from kvpress_moe.model.layers import full_attention_layers, slides
from kvpress_moe.model.projection_cache import ProjectionCache
from kvpress_moe.model.transformers_api import attention_arguments
from tests.tiny import FAMILIES, decoder, kept_positions, lengths, overlap, prefill, tiny_model, tokens

PROMPT, QUESTION = 100, 5
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
if TRANSFORMERS_4:
    PARTIAL = {"partial_rotary_factor": 0.5}
GEMMA = tuple(family for family in ("gemma2", "gemma3_text", "gemma3") if family in FAMILIES)


@pytest.fixture(scope="module", params=(*FAMILIES, "phi3_partial"))
def model(request):
    """A model of each family; ``phi3_partial`` rotates half of each head's dimensions, as Phi-4 mini does."""
    if request.param == "phi3_partial":
        return tiny_model("phi3", **PARTIAL)
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=GEMMA)
def gemma(request):
    return tiny_model(request.param)


def own_cache(model):
    """The cache that ``generate`` makes: it knows which layers slide."""
    return DynamicCache(config=model.config)


def sliding(model):
    return [index for index, layer in enumerate(decoder(model).layers) if slides(layer.self_attn.config, index)]


def expected_lengths(model, cache, n_full, n_sliding):
    return [n_sliding if index in sliding(model) else n_full for index in range(len(cache.layers))]


def ask(model, cache, question, one_by_one, n_prompt=PROMPT):
    """Logits (B, Q, vocabulary) of a question that stands right after the prompt."""
    positions = torch.arange(n_prompt, n_prompt + question.shape[1])[None]
    step = 1 if one_by_one else question.shape[1]
    with torch.no_grad():
        logits = [
            model(input_ids=some, past_key_values=cache, position_ids=where).logits
            for some, where in zip(question.split(step, 1), positions.split(step, 1), strict=True)
        ]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("ratio", [0.25, 0.8])
def test_a_prompt_shrinks_by_the_exact_number_of_pairs(model, ratio, batch_size):
    press = MoERouterPress(compression_ratio=ratio)
    cache = prefill(model, tokens(PROMPT, batch_size), press, own_cache(model))
    assert lengths(cache) == expected_lengths(model, cache, compute_n_kept(PROMPT, ratio), 15)
    assert all(layer.keys.isfinite().all() for layer in cache.layers)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_generation_runs(model, batch_size, num_beams):
    cache = own_cache(model)
    settings = {"past_key_values": cache, "max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    with MoERouterPress()(model):
        output = model.generate(tokens(PROMPT, batch_size), **settings)
    assert output.shape == (batch_size, PROMPT + 6)
    assert lengths(cache) == expected_lengths(model, cache, compute_n_kept(PROMPT, 0.5) + 5, 15)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
@pytest.mark.parametrize("experts", ["strong", ["expected_attention", "selective"]], ids=["strong", "queries"])
def test_experts_of_all_kinds_judge_every_family(model, experts):
    cache = own_cache(model)
    with MoERouterPress(experts=experts)(model):
        output = model.generate(tokens(PROMPT), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert output.shape == (1, PROMPT + 3)
    assert lengths(cache) == expected_lengths(model, cache, compute_n_kept(PROMPT, 0.5) + 2, 15)


@pytest.mark.parametrize("name", ["expected_attention", "non_causal", "snapkv"])
def test_an_expert_that_cannot_rotate_part_of_a_head_says_so(name):
    model = tiny_model("phi3", **PARTIAL)
    with pytest.raises(RuntimeError, match=f"expert '{name}' failed on layer 0"):
        prefill(model, tokens(PROMPT), MoERouterPress(experts=[name]))


@pytest.mark.parametrize("name", ["leverage", "cur", "keydiff", "knorm", "lagkv", "temporal_aware", "semantic_aware"])
def test_experts_that_rotate_nothing_judge_heads_that_are_rotated_in_part(name):
    model = tiny_model("phi3", **PARTIAL)
    assert lengths(prefill(model, tokens(PROMPT), MoERouterPress(experts=[name]))) == [PROMPT // 2] * 2


@pytest.mark.parametrize("family", [*FAMILIES, "phi3_partial"])
def test_queries_and_attention_are_the_layers_own(family):
    """What experts and hit rates are computed from, against the weights that eager attention returns."""
    settings = PARTIAL if family == "phi3_partial" else {}
    model = tiny_model(family.removesuffix("_partial"), attn_implementation="eager", **settings)
    calls, projections = [], ProjectionCache()

    def look(module, args, kwargs, output):
        kwargs = attention_arguments(module, kwargs)
        keys, values = (
            getattr(kwargs["past_key_values"].layers[module.layer_idx], name) for name in ("keys", "values")
        )
        projected = projections.of(module, kwargs["hidden_states"])
        for known in ({}, projected):  # projected again, or as the layer projected them
            call = LayerCall(module, kwargs["hidden_states"], keys, values, None, kwargs, projected=known)
            if not slides(module.config, module.layer_idx):
                calls.append((latest_attention(call, 20), output[1]))

    with ExitStack() as leave:
        for layer in decoder(model).layers:
            leave.callback(layer.self_attn.register_forward_hook(look, with_kwargs=True).remove)
        leave.enter_context(projections.watch(model))
        prefill(model, tokens(PROMPT, 2))
    assert calls
    for own, theirs in calls:
        torch.testing.assert_close(own, theirs[:, :, -20:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
@pytest.mark.parametrize("name", ["snapkv", "tova", "selective"])
def test_attending_experts_keep_what_they_keep_when_they_are_given_the_attention(family, name):
    """kvpress's scorers know neither the norms of Qwen 3 MoE and OLMoE nor the soft cap of Gemma 2."""
    model = tiny_model(family, attn_implementation="eager")
    press = MoERouterPress(experts=[name], cache_aware=False)
    full, given = prefill(model, tokens(2 * PROMPT)), prefill(model, tokens(2 * PROMPT), press)
    compress = type(press).compress
    press.compress = lambda module, states, keys, values, attentions, kwargs: compress(
        press, module, states, keys, values, None, kwargs
    )
    computed = prefill(model, tokens(2 * PROMPT), press)
    for one, other in zip(kept_positions(full, given), kept_positions(full, computed), strict=True):
        assert overlap(one, other) >= 0.98  # a tie of floats may fall either way


@pytest.mark.parametrize("family", [family for family in ("qwen3", "qwen3_moe", "olmoe") if family in FAMILIES])
def test_keys_before_rotation_are_normed_as_in_the_layer(family):
    """Leverage scores are computed from them; norms and rotation keep a key's length."""
    model = tiny_model(family, **({"clip_qkv": None} if family == "olmoe" else {}))
    lengths_of_keys = []

    def look(module, args, kwargs, output):
        kwargs = attention_arguments(module, kwargs)
        keys = kwargs["past_key_values"].layers[module.layer_idx].keys
        before = get_prerope_key_states(AttentionView(module, kwargs["hidden_states"]), kwargs["hidden_states"])
        lengths_of_keys.append((before.norm(dim=-1), keys.norm(dim=-1)))

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in decoder(model).layers]
    prefill(model, tokens(PROMPT))
    for hook in hooks:
        hook.remove()
    for before, after in lengths_of_keys:
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)


def test_a_question_sees_what_its_tokens_would_see_one_by_one(model):
    cache = prefill(model, tokens(PROMPT), MoERouterPress(), own_cache(model))
    question = tokens(QUESTION, seed=1)
    one_by_one = ask(model, copy.deepcopy(cache), question, one_by_one=True)
    torch.testing.assert_close(ask(model, cache, question, one_by_one=False), one_by_one, atol=1e-4, rtol=1e-4)
    assert lengths(cache)[full_attention_layers(model)[-1]] == compute_n_kept(PROMPT, 0.5) + QUESTION


def test_a_question_right_after_an_uncompressed_prompt_is_answered_as_in_one_piece(model):
    prompt, question = tokens(PROMPT), tokens(QUESTION, seed=1)
    cache = prefill(model, prompt, MoERouterPress(compression_ratio=0), own_cache(model))
    with torch.no_grad():
        whole = model(torch.cat((prompt, question), dim=1)).logits[:, PROMPT:]
    torch.testing.assert_close(ask(model, cache, question, one_by_one=False), whole, atol=1e-4, rtol=1e-4)


def test_selective_judges_by_the_attention_that_the_model_itself_pays(model):
    """Eager attention hands over the model's own weights; otherwise the press computes them from queries."""
    press = MoERouterPress(experts=["selective"], compression_ratio=0.6)
    full = prefill(model, tokens(PROMPT))
    computed = kept_positions(full, prefill(model, tokens(PROMPT), press))
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        given = kept_positions(prefill(model, tokens(PROMPT)), prefill(model, tokens(PROMPT), press))
    finally:
        model.set_attn_implementation(before)
    for one, other in zip(computed, given, strict=True):
        assert overlap(one, other) >= 0.97  # rounding may swap a pair at the edge of the budget


# ── Gemma 3: layers that slide ───────────────────────────────────────────────────────────────────────────────────────


def test_gemmas_sliding_layers_are_untouched(gemma):
    without = prefill(gemma, tokens(PROMPT), None, own_cache(gemma))
    cache = prefill(gemma, tokens(PROMPT), MoERouterPress(), own_cache(gemma))
    for before, after in zip(without.layers[:1], cache.layers[:1], strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
        assert before.get_seq_length() == after.get_seq_length()


def test_gemmas_sliding_layers_are_not_routed(gemma):
    press = MoERouterPress()
    prefill(gemma, tokens(PROMPT), press, own_cache(gemma))
    assert list(press.get_stats()["layer_stats"]) == [1, 2]


SLIDING, FULL = "sliding_attention", "full_attention"
LAYOUTS = [(SLIDING, FULL, FULL), (SLIDING, FULL, SLIDING), (SLIDING, SLIDING, FULL, SLIDING)]  # all begin sliding


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(kind[0] for kind in layout))
@pytest.mark.parametrize("n_prompt", [10, PROMPT])  # shorter than the window, and longer
@pytest.mark.parametrize("family", GEMMA)
def test_gemma_answers_alike_from_any_cache(family, n_prompt, layout):
    """The kvpress pipeline makes a cache that does not know which layers slide, and holds the whole prompt in them."""
    gemma = tiny_model(family, layer_types=list(layout), num_hidden_layers=len(layout))
    answers = []
    for cache in (DynamicCache(), DynamicCache(config=gemma.config)):
        prefill(gemma, tokens(n_prompt), MoERouterPress(cache_aware=False), cache)
        for one_by_one in (True, False):
            answers.append(ask(gemma, copy.deepcopy(cache), tokens(QUESTION, seed=1), one_by_one, n_prompt))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-4, rtol=1e-4)


def test_a_plain_cache_holds_the_whole_prompt_in_gemmas_sliding_layers(gemma):
    assert lengths(prefill(gemma, tokens(PROMPT), MoERouterPress())) == [PROMPT, PROMPT // 2, PROMPT // 2]


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 has an embedding for each layer type")
@pytest.mark.parametrize("gemma", ["gemma3_text", "gemma3"], indirect=True)
def test_experts_rotate_by_the_layer_type_of_gemma_3(gemma):
    """kvpress's presses do not pass it, and transformers 5.2 then finds no frequencies."""
    states, positions, rotary_emb = torch.zeros(1, 1, 8), torch.arange(9)[None], decoder(gemma).rotary_emb
    for layer in decoder(gemma).layers:
        attention = layer.self_attn
        attention.rotary_emb = rotary_emb
        got = AttentionView(attention, None).rotary_emb(states, positions)
        del attention.rotary_emb
        expected = rotary_emb(states, positions, attention.layer_type)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gemma_decides_a_free_budget_in_its_first_full_layer(gemma):
    cache = prefill(gemma, tokens(PROMPT), MoERouterPress(compression_ratio=None), own_cache(gemma))
    _, first, second = lengths(cache)
    assert first == second < PROMPT


def test_a_model_whose_layers_all_slide_is_refused():
    model = tiny_model("mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"every layer of this MistralForCausalLM .* sliding window of 16"):
        prefill(model, tokens(PROMPT), MoERouterPress())
