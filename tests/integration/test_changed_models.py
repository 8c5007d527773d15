"""Models that differ from how they were loaded: they work as they would without the change, or are refused by name."""

import copy
from contextlib import nullcontext

import pytest
import torch
from kvpress import ComposedPress
from torch import nn
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, UnsupportedInputError, UnsupportedModelError, load_model
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.training.trainer import check_has_weights
from tests.tiny import calibrated_routers, decoder, greedy, lengths, prefill, tiny_model, tokens

PROMPT = tokens(60)


class Packed(nn.Module):
    """A projection without ``.weight``, as of GPTQ, AWQ, HQQ or torch's int8."""

    def __init__(self, linear, weight_is_a_method=False):
        super().__init__()
        self.inner = [linear]
        if weight_is_a_method:  # torch.ao.nn.quantized.dynamic.Linear
            self.weight = lambda: linear.weight

    def forward(self, states):
        return self.inner[0](states)


def trained(model, **settings):
    return MoERouterPress(0.5, router=calibrated_routers(model), **settings)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("weight_is_a_method", [False, True])
@pytest.mark.parametrize("projections", [("o_proj",), ("q_proj", "k_proj", "v_proj", "o_proj")])
def test_packed_weights_keep_the_pairs_that_the_open_ones_keep(projections, weight_is_a_method):
    model = tiny_model("llama")
    routers = calibrated_routers(model)
    settings = [{"router": routers}, {"experts": ["expected_attention", "leverage", "snapkv"], "top_k": 3}]
    expected = [prefill(model, PROMPT, MoERouterPress(0.5, budget="uniform", **given)) for given in settings]
    for layer in decoder(model).layers:
        for name in projections:
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name), weight_is_a_method))
    for given, full in zip(settings, expected, strict=True):
        cache = prefill(model, PROMPT, MoERouterPress(0.5, budget="uniform", **given))
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, full.layers, strict=True))
    assert model_fingerprint(model)["samples"] is None
    with pytest.raises(UnsupportedModelError, match="^model: got packed weights"):
        check_has_weights(model)


@pytest.mark.parametrize("budget", ["uniform", "layer", "global"])
def test_autocast_prefills_and_decodes(budget):
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with trained(model, budget=budget)(model):
            written = model.generate(PROMPT, max_new_tokens=6, eos_token_id=999, do_sample=False)
        cache = prefill(model, PROMPT, trained(model, budget=budget))
        assert torch.equal(greedy(model, written[:, 60:61], cache, 60, 5)[0], written[0, 61:])


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_a_cache_made_outside_of_autocast_is_read_inside_and_the_other_way_round(budget):
    model = tiny_model("llama")
    for first in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            cache = prefill(model, PROMPT, trained(model, budget=budget))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first), torch.no_grad():
            if first:  # float32 questions to bfloat16 pairs: as with a plain cache, torch says what does not fit
                continue
            assert model(tokens(3), past_key_values=cache).logits.isfinite().all()


def test_a_model_prepared_by_accelerate_is_compressed_as_itself():
    from accelerate import Accelerator

    model = tiny_model("llama")
    expected = prefill(model, PROMPT, trained(model, budget="uniform"))
    prepared = Accelerator(cpu=True).prepare(model)
    cache = prefill(prepared, PROMPT, trained(prepared, budget="uniform"))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, expected.layers, strict=True))


def test_gradient_checkpointing_in_training_mode_is_refused_before_the_first_layer():
    model = tiny_model("llama").train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable()
    before = hooks(model)
    with pytest.raises(UnsupportedInputError, match="^model: got gradient checkpointing"), MoERouterPress(0.5)(model):
        model(PROMPT)
    assert hooks(model) == before
    assert lengths(prefill(model.eval(), PROMPT, MoERouterPress(0.5, num_experts=4))) == [30, 30]


def test_the_loss_inside_the_block_is_the_full_caches_and_a_warning_says_so(llama):
    expected = llama(PROMPT, labels=PROMPT).loss
    with MoERouterPress(0.9)(llama), pytest.warns(UserWarning, match="^labels: the loss inside the block is that of"):
        loss = llama(PROMPT, labels=PROMPT).loss
    assert torch.equal(loss, expected)


def test_the_attention_of_a_part_decides():
    model = tiny_model("gemma3")
    model.set_attn_implementation({"text_config": "eager"})
    press = trained(model)
    cache = prefill(model, PROMPT, press)
    assert press.scope == "uniform"
    assert cache.get_seq_length() == 60
    with pytest.raises(ValueError, match="^budget: got 'global', expected 'uniform' with eager"):
        prefill(model, PROMPT, trained(model, budget="global"))


def test_attention_that_is_changed_inside_the_block_is_followed_and_a_ragged_cache_says_what_it_needs():
    model = tiny_model("llama")
    press = trained(model)
    with press(model), torch.no_grad():
        ragged = DynamicCache()
        model.model(PROMPT, past_key_values=ragged)
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedInputError, match=r"set_attn_implementation\('sdpa'\)"):
            model(tokens(1), past_key_values=ragged)
        dense = DynamicCache()
        model.model(PROMPT, past_key_values=dense)
        assert press.scope == "uniform"
        assert lengths(dense) == [30, 30]


class Wrapped(nn.Module):
    """What PEFT puts around a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_model_wrapped_by_peft_is_refused_with_the_remedy_which_works(llama):
    wrapped = Wrapped(llama)
    with pytest.raises(UnsupportedModelError, match=r"with press\(model.get_base_model\(\)\)"):
        MoERouterPress(0.5).post_init_from_model(wrapped)
    cache = DynamicCache()
    with MoERouterPress(0.5, num_experts=4)(wrapped.get_base_model()), torch.no_grad():
        wrapped(PROMPT, past_key_values=cache)
    assert lengths(cache) == [30, 30]


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_a_model_copied_inside_the_block_is_a_model_without_a_press(budget):
    model = tiny_model("llama")
    press = trained(model, budget=budget)
    full = prefill(model, PROMPT)
    with press(model), torch.no_grad():
        prefilled = DynamicCache()
        model.model(PROMPT, past_key_values=prefilled)
        twin = copy.deepcopy(model)
        counted = press.get_stats()
        inside = DynamicCache()
        twin.model(PROMPT, past_key_values=inside)
        assert press.get_stats() == counted
    for block in (nullcontext(), press(model)):
        with block:
            after = prefill(twin, PROMPT)
        for cache in (inside, after):
            assert lengths(cache) == [60, 60]
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, full.layers, strict=True))
    assert prefill(twin, PROMPT, trained(twin, budget="uniform")).layers[0].keys.shape[2] == 30
    assert not press._session.projections._projected
    twin(PROMPT, labels=PROMPT)  # warnings are errors in this suite


def test_a_press_copied_inside_the_block_still_compresses_in_a_wrapper():
    model = tiny_model("llama")
    press = trained(model, budget="uniform")
    with press(model):
        copied = copy.deepcopy(press)
    assert lengths(prefill(model, PROMPT, ComposedPress([copied]))) == [30, 30]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft
def test_an_adapter_is_loaded_with_its_base_model(model_directory, tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(str(model_directory))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(model_directory)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(str(tmp_path / "adapter"))
    assert lengths(prefill(loaded, PROMPT, MoERouterPress(0.5, num_experts=4))) == [30, 30]


@pytest.mark.parametrize("kept", [slice(0, 2), slice(1, 3)])
def test_layers_cut_off_without_a_change_of_the_configuration_are_refused_with_the_remedy(kept):
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers = model.model.layers[kept]
    with pytest.raises(UnsupportedModelError, match=r"got 2 decoder layers numbered .*, expected .* 0 to 2"):
        prefill(model, PROMPT, trained(model))
    model.config.num_hidden_layers = 2
    for layer_idx, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = layer_idx
    cache = prefill(model, PROMPT, trained(model, budget="global"))
    assert sum(sum(layer.lengths[0]) for layer in cache.layers) == 2 * 2 * 30


def test_resized_embeddings_leave_the_routers_in_use():
    model = tiny_model("llama")
    routers = calibrated_routers(model)
    routers.fingerprint = model_fingerprint(model)
    expected = prefill(model, PROMPT, MoERouterPress(0.5, router=routers))
    model.resize_token_embeddings(320)
    cache = prefill(model, PROMPT, MoERouterPress(0.5, router=routers))
    assert all(torch.equal(a.flat_keys, b.flat_keys) for a, b in zip(cache.layers, expected.layers, strict=True))
