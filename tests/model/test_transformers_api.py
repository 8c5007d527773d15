"""One code for all releases of transformers: names of arguments, warnings, crops, families that are refused."""

import warnings

import pytest
import torch
import transformers
from kvpress import AdaKVPress, DecodingPress, KeyDiffPress, KnormPress
from kvpress.pipeline import KVPressTextGenerationPipeline
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, UnsupportedModelError
from kvpress_moe.cache.prefill import Prefill
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.transformers_api import (
    CACHE,
    attention_arguments,
    crop,
    given_cache,
    own_names,
    returned_cache,
    with_cache,
)
from tests.tiny import byte_tokenizer, calibrated_routers, decoder, lengths, tiny_model, tokens

PROMPT = tokens(60)


@pytest.fixture
def _no_deprecated_names():
    """Every warning is an error, also those that the suite ignores elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_cache_comes_back_under_the_name_it_was_given_by(llama):
    cache = DynamicCache()
    output = llama.model(PROMPT, **with_cache(cache, torch.arange(60)))
    assert returned_cache(output) is cache
    assert given_cache({CACHE: cache}) is given_cache({"past_key_values": cache}) is cache
    assert given_cache({}) is None


@pytest.mark.parametrize("n_before", [0, 60])
def test_attention_arguments_say_which_tokens_are_new(llama, n_before):
    seen, cache = [], DynamicCache()
    if n_before:
        llama.model(tokens(n_before, seed=1), **with_cache(cache))

    def look(module, args, kwargs, output):
        seen.append(attention_arguments(module, kwargs))

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in decoder(llama).layers]
    llama.model(tokens(7), **with_cache(cache))
    for hook in hooks:
        hook.remove()
    for arguments in seen:
        assert arguments["past_key_values"] is cache
        assert arguments["cache_position"].tolist() == list(range(n_before, n_before + 7))


def test_a_crop_leaves_the_length_that_was_asked_for(llama):
    cache = DynamicCache()
    llama.model(PROMPT, **with_cache(cache))
    for length in (60, 41, 3):
        crop(cache, length)
        assert cache.get_seq_length() == length


@pytest.mark.usefixtures("_no_deprecated_names")
@pytest.mark.parametrize("budget", ["uniform", "layer", "global"])
def test_nothing_warns_of_a_name_under_the_press(budget):
    llama = tiny_model("llama")
    press = MoERouterPress(0.5, router=calibrated_routers(llama), budget=budget)
    with press(llama), torch.no_grad():
        llama.generate(PROMPT, max_new_tokens=4, do_sample=False)
    pipeline = KVPressTextGenerationPipeline(model=llama, tokenizer=byte_tokenizer())
    assert pipeline("The crane lifts twelve tons. " * 4, question="Who?", press=press, max_new_tokens=4)["answer"]
    assert Prefill(llama, PROMPT).compress(press).get_seq_length() == 60


@pytest.mark.usefixtures("_no_deprecated_names")
def test_callers_may_use_kvpress_s_name_inside_the_block(llama):
    cache = DynamicCache()
    with own_names(llama, llama.model), torch.no_grad():
        llama(PROMPT, past_key_values=cache)
        llama.model(tokens(3), past_key_values=cache)
    assert cache.get_seq_length() == 63
    assert not llama._forward_pre_hooks
    assert not llama.model._forward_pre_hooks


@pytest.mark.parametrize("alone", [lambda: KnormPress(0.5), lambda: AdaKVPress(KeyDiffPress(0.5))])
def test_kvpress_s_own_presses_run_beside_ours_in_every_release(alone):
    llama = tiny_model("llama")
    teach_kvpress()  # as making a MoERouterPress does
    cache = DynamicCache()
    with alone()(llama), torch.no_grad():
        llama.model(PROMPT, **with_cache(cache))
    masked = llama.model.layers[0].self_attn.masked_key_indices
    assert lengths(cache) == [30, 30] if masked is None else len(masked[0]) == 60
    teach_kvpress()  # again changes nothing
    again = DynamicCache()
    with alone()(llama), torch.no_grad():
        llama.model(PROMPT, **with_cache(again))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(again.layers, cache.layers, strict=True))


def test_a_press_that_compresses_while_decoding_wraps_ours():
    llama, cache = tiny_model("llama"), DynamicCache()
    press = DecodingPress(MoERouterPress(0.5, experts=["knorm"]), compression_interval=8, target_size=20)
    with press(llama), torch.no_grad():
        llama.generate(PROMPT, **with_cache(cache), max_new_tokens=20, do_sample=False)
    assert max(lengths(cache)) < 60


#: None of them is served: linear attention, several head sizes, norms unknown to kvpress.
REFUSED = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Gemma4ForCausalLM",
    "SmolLM3ForCausalLM",
    "Ministral3ForCausalLM",
)


@pytest.mark.parametrize("name", REFUSED)
def test_newer_families_that_cannot_be_served_are_refused_by_name(name):
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip("this release does not have it")
    model = model_class.__new__(model_class)  # its class decides; some of them cannot be made small
    torch.nn.Module.__init__(model)
    with pytest.raises(UnsupportedModelError, match=rf"^model: got {name}, expected one of .*LlamaForCausalLM"):
        MoERouterPress(0.5).post_init_from_model(model)
    assert not model._forward_pre_hooks
