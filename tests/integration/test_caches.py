"""
Caches that shrink work, whatever stores their pairs; caches and inputs that would be compressed wrongly without a word
are refused before the first layer runs, in every family.
"""

import pytest
import torch
from kvpress.utils import compute_n_kept
from transformers import DynamicCache, QuantizedCache, StaticCache

from kvpress_moe import MoERouterPress
from kvpress_moe.errors import SettingError, UnsupportedInputError
from kvpress_moe.model.layers import full_attention_layers
from kvpress_moe.press.input_checks import check_can_turn_ragged
from tests.quantized import RoundedCache, quantized_lengths
from tests.tiny import FAMILIES, greedy, lengths, prefill, tiny_model, tokens

PROMPT, QUESTION = 100, 5
N_KEPT = compute_n_kept(PROMPT, 0.5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def answer(model, cache):
    """Compress a prompt into a cache, ask, and return the answer's tokens."""
    prefill(model, tokens(PROMPT).to(model.device), MoERouterPress(cache_aware=False), cache)
    return greedy(model, tokens(QUESTION, seed=1).to(model.device), cache, PROMPT, 4)


# ── caches that shrink ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cache_that_knows_the_model_answers_as_one_that_does_not(llama):
    plain, aware = DynamicCache(), DynamicCache(config=llama.config)
    assert torch.equal(answer(llama, plain), answer(llama, aware))
    assert lengths(plain) == lengths(aware) == [N_KEPT + QUESTION + 3] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA devices only")
def test_an_offloaded_cache_answers_as_one_that_stays():
    model = tiny_model("llama").to("cuda")
    offloaded = DynamicCache(config=model.config, offloading=True)
    assert torch.equal(answer(model, offloaded), answer(model, DynamicCache()))
    assert lengths(offloaded) == [N_KEPT + QUESTION + 3] * 2


@pytest.mark.parametrize("residual_length", [1, 32])
def test_a_quantised_cache_is_compressed_and_answers(llama, residual_length):
    cache = RoundedCache(2, residual_length)
    prefill(llama, tokens(PROMPT), MoERouterPress(), cache)
    assert quantized_lengths(cache) == [N_KEPT] * 2
    assert greedy(llama, tokens(QUESTION, seed=1), cache, PROMPT, 4).shape == (1, 4)
    assert quantized_lengths(cache) == [N_KEPT + QUESTION + 3] * 2


@pytest.mark.parametrize(("backend", "module"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_the_quantised_caches_of_transformers_are_compressed_and_answer(backend, module):
    pytest.importorskip(module)
    model = tiny_model("llama", hidden_size=256)  # heads of 64: quantisation groups divide them
    cache = QuantizedCache(backend, model.config, nbits=4, axis_key=0, axis_value=0, q_group_size=64)
    prefill(model, tokens(PROMPT), MoERouterPress(), cache)
    assert quantized_lengths(cache) == [N_KEPT] * 2
    assert greedy(model, tokens(QUESTION, seed=1), cache, PROMPT, 4).shape == (1, 4)


def test_generate_makes_a_cache_by_itself(llama):
    with MoERouterPress(compression_ratio=0.9)(llama):
        output = llama.generate(tokens(PROMPT), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert lengths(output.past_key_values) == [compute_n_kept(PROMPT, 0.9) + 2] * 2


# ── refused, before the first layer runs ─────────────────────────────────────────────────────────────────────────────


def test_a_static_cache_is_refused(model):
    with pytest.raises(UnsupportedInputError, match=r"StaticCache.*Use a DynamicCache"):
        prefill(model, tokens(PROMPT), MoERouterPress(), StaticCache(config=model.config, max_cache_len=256))


def test_a_static_cache_that_generate_makes_is_refused(llama):
    with pytest.raises(UnsupportedInputError, match="StaticCache"), MoERouterPress()(llama):
        llama.generate(tokens(PROMPT), max_new_tokens=2, cache_implementation="static")


def test_a_forward_without_a_cache_is_refused(model):
    with pytest.raises(UnsupportedInputError, match="use_cache: got False"), MoERouterPress()(model):
        model(tokens(PROMPT), use_cache=False)


def test_generation_without_a_cache_is_refused(llama):
    with pytest.raises(UnsupportedInputError, match="use_cache: got False"), MoERouterPress()(llama):
        llama.generate(tokens(PROMPT), max_new_tokens=2, use_cache=False)


def test_a_configuration_without_a_cache_is_refused():
    model = tiny_model("llama", use_cache=False)
    with pytest.raises(UnsupportedInputError, match="use_cache: got False"), MoERouterPress()(model):
        model(tokens(PROMPT))


def test_a_mask_of_ones_is_no_padding(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), MoERouterPress()(model):
        model(tokens(PROMPT, 2), attention_mask=torch.ones(2, PROMPT), past_key_values=cache)
    assert lengths(cache)[full_attention_layers(model)[-1]] == N_KEPT


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UnsupportedInputError, match="prompt without tokens"):
        prefill(model, tokens(0), MoERouterPress())


def test_an_empty_prompt_of_embeddings_is_refused(llama):
    with pytest.raises(UnsupportedInputError, match="prompt without tokens"), MoERouterPress()(llama):
        llama(inputs_embeds=torch.empty(1, 0, 32))


def test_a_prompt_of_embeddings_is_compressed_as_its_tokens_are(llama):
    by_tokens = prefill(llama, tokens(PROMPT), MoERouterPress(cache_aware=False))
    by_embeddings = DynamicCache()
    with torch.no_grad(), MoERouterPress(cache_aware=False)(llama):
        llama(inputs_embeds=llama.get_input_embeddings()(tokens(PROMPT)), past_key_values=by_embeddings)
    assert torch.equal(by_tokens.layers[1].keys, by_embeddings.layers[1].keys)


def test_nothing_has_run_when_an_input_is_refused(model):
    press, cache = MoERouterPress(), DynamicCache()
    mask = torch.ones(2, PROMPT)
    mask[0, -1] = 0
    with pytest.raises(UnsupportedInputError), press(model):
        model(tokens(PROMPT, 2), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert press.get_stats()["forward_count"] == 0


# ── a cache that is not empty ────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_that_meet_a_full_cache_are_not_compressed_and_the_press_says_so(model):
    press, cache = MoERouterPress(), DynamicCache(config=model.config)
    prefill(model, tokens(PROMPT), press, cache)
    full = full_attention_layers(model)
    before = [(cache.layers[i].keys.clone(), cache.layers[i].values.clone()) for i in full]
    positions = torch.arange(PROMPT, PROMPT + QUESTION)[None]
    with torch.no_grad(), press(model), pytest.warns(UserWarning, match=r"5 tokens meet a cache .* not compressed"):
        model(tokens(QUESTION, seed=1), past_key_values=cache, position_ids=positions)
    assert {lengths(cache)[i] for i in full} == {N_KEPT + QUESTION}
    for layer, (keys, values) in zip((cache.layers[i] for i in full), before, strict=True):
        assert torch.equal(layer.keys[:, :, :N_KEPT], keys)
        assert torch.equal(layer.values[:, :, :N_KEPT], values)
    assert press.get_stats()["forward_count"] == 1


def test_a_prompt_prefilled_in_pieces_is_warned_of(llama):
    with MoERouterPress()(llama), pytest.warns(UserWarning, match=r"not compressed.*Chunked prefill"):
        llama.generate(tokens(PROMPT), max_new_tokens=2, prefill_chunk_size=64, do_sample=False)


@pytest.mark.filterwarnings("error")
def test_decoding_inside_the_block_does_not_warn(llama):
    with MoERouterPress()(llama):
        llama.generate(tokens(PROMPT), max_new_tokens=4, do_sample=False)


def test_an_offloaded_cache_cannot_turn_ragged():
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(SettingError, match="^budget: .*not an offloaded cache. Use budget='uniform'"):
        check_can_turn_ragged(cache, 0, inside_wrapper=False)
