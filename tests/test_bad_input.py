"""Everything wrong is refused with a text that says what, before any work; hooks are gone and nothing was written."""

import pickle

import kvpress
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from kvpress_moe import (
    CheckpointError,
    ExpertError,
    MoERouterPress,
    RouterConfig,
    Routers,
    SettingError,
    UnsupportedInputError,
    UnsupportedModelError,
    load_routers,
    save_routers,
)
from kvpress_moe.model.fingerprint import fingerprint
from tests.tiny import prefill, tiny_model, tokens

WRONG = [
    ("num_experts", 0),
    ("num_experts", -1),
    ("num_experts", 9),
    ("num_experts", 2.5),
    ("num_experts", True),
    ("top_k", 0),
    ("top_k", 5),
    ("top_k", "2"),
    ("capacity_factor", 0.9),
    ("capacity_factor", 0),
    ("capacity_factor", float("nan")),
    ("capacity_factor", float("inf")),
    ("dropout", -0.1),
    ("dropout", 1.0),
    ("router_type", "eplb"),
    ("router_type", None),
    ("cache_aware", 1),
    ("track_misses", "yes"),
    ("compression_ratio", 1.0),
    ("compression_ratio", -0.1),
    ("compression_ratio", 2),
    ("compression_ratio", "0.5"),
    ("compression_ratio", float("nan")),
    ("aux_loss_weight", -1),
    ("aux_loss_weight", None),
    ("experts", ["nobody"]),
    ("experts", "nobody"),
    ("experts", []),
    ("experts", [kvpress.KnormPress]),
    ("experts", [3]),
    ("experts", [kvpress.AdaKVPress(kvpress.KnormPress(0.5))]),
    ("router", ""),
    ("router", 7),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_every_wrong_setting_is_refused_by_name_with_what_was_expected(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*expected "):
        MoERouterPress(**{field: value})


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_setting_is_refused_later_too_and_changes_nothing(field, value):
    press = MoERouterPress()
    before = repr(press), dict(press.expert_strategies)
    with pytest.raises(ValueError, match=rf"^{field}: got .*expected "):
        setattr(press, field, value)
    assert (repr(press), dict(press.expert_strategies)) == before


def test_errors_travel_between_processes():
    with pytest.raises(SettingError) as raised:
        MoERouterPress(dropout=2)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_running_out_of_memory_stays_what_it_is(llama):
    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), torch.no_grad(), MoERouterPress(experts=[hungry])(llama):
        llama(torch.zeros(1, 10, dtype=torch.long), past_key_values=DynamicCache())


def test_top_k_above_num_experts_is_refused():
    with pytest.raises(SettingError, match="top_k: got 3, expected at most num_experts = 2"):
        MoERouterPress(num_experts=2, top_k=3)
    with pytest.raises(SettingError, match="top_k"):
        MoERouterPress(experts=["knorm"], top_k=2)
    press = MoERouterPress()
    with pytest.raises(SettingError, match="top_k"):
        press.num_experts = 1
    assert press.num_experts == 4


def test_a_number_that_disagrees_with_the_list_of_experts_is_refused():
    with pytest.raises(SettingError, match="num_experts: got 3, expected the number of `experts` given, 2"):
        MoERouterPress(experts=["knorm", "tova"], num_experts=3)


@pytest.mark.parametrize("strategies", [{0: "nobody"}, {0: "knorm"}, {i: "knorm" for i in range(5)}, {}])
def test_wrong_strategies_are_refused(strategies):
    press = MoERouterPress()
    with pytest.raises(SettingError):
        press.expert_strategies = strategies
    with pytest.raises(SettingError):
        press.expert_strategies[0] = "nobody"
    with pytest.raises(KeyError):
        press.expert_strategies[4] = "knorm"
    assert press.expert_strategies[0] == "aggressive"


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
        for module in model.modules()
    )


def refuse(model, press, error, match, input_ids=None, **kwargs):
    """The error comes out of the with block, no layer has run, and the model is as it was."""
    ran = []
    before = [name for name, _ in model.named_modules()]
    first = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    counter = first.register_forward_hook(lambda *args: ran.append(1))
    n_hooks = hooks(model)
    with pytest.raises(error, match=match), torch.no_grad(), press(model):
        model(torch.zeros(1, 10, dtype=torch.long) if input_ids is None else input_ids, **kwargs)
    assert ran == []
    assert hooks(model) == n_hooks
    counter.remove()
    assert [name for name, _ in model.named_modules()] == before


def test_an_unsupported_model_class_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    refuse(gpt2, MoERouterPress(), UnsupportedModelError, "GPT2LMHeadModel.*LlamaForCausalLM")


def test_a_model_with_sliding_windows_only_is_refused():
    refuse(tiny_model("mistral", sliding_window=32), MoERouterPress(), UnsupportedModelError, "sliding window of 32")


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model, lambda model: model.model.layers[1]])
def test_a_compiled_model_is_refused_however_it_was_compiled(part):
    """Compiled code does not see the hooks: the prompt would stay whole, without a word."""
    model = tiny_model("llama")
    part(model).compile(backend="eager")
    refuse(model, MoERouterPress(), UnsupportedModelError, "compiled by torch.compile")
    model = tiny_model("llama")
    part(model).forward = torch.compile(part(model).forward, backend="eager")
    refuse(model, MoERouterPress(), UnsupportedModelError, "compiled by torch.compile")


def test_an_empty_prompt_is_refused(llama):
    empty = torch.zeros(1, 0, dtype=torch.long)
    refuse(llama, MoERouterPress(), UnsupportedInputError, "without tokens", empty, past_key_values=DynamicCache())


def test_a_batch_padded_on_the_right_is_refused(llama):
    ids, mask = torch.ones(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    refuse(llama, MoERouterPress(), UnsupportedInputError, "padding on the right", ids, attention_mask=mask)


def test_a_forward_pass_without_a_cache_is_refused(llama):
    refuse(llama, MoERouterPress(), UnsupportedInputError, "use_cache: got False", use_cache=False)


def test_a_static_cache_is_refused(llama):
    cache = StaticCache(config=llama.config, max_cache_len=32)
    refuse(llama, MoERouterPress(), UnsupportedInputError, "StaticCache", past_key_values=cache)


def test_observed_attention_without_eager_attention_is_refused(llama):
    refuse(llama, MoERouterPress(experts=["observed_attention"]), SettingError, "attn_implementation='eager'")


def saved(model, path, **changes):
    config = model.config
    settings = {"num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size} | changes
    experts = settings.pop("experts", ("knorm", "tova"))
    print_of_model = fingerprint(config, model.model.layers[0].self_attn)
    return save_routers(Routers(RouterConfig("pikv", experts, **settings), print_of_model), path)


def test_a_router_file_of_its_own_model_is_accepted_also_in_half_precision(llama, tmp_path):
    path = saved(llama, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        press = MoERouterPress(experts=["knorm", "tova"], router=path)
        with torch.no_grad(), press(model):
            model(torch.zeros(1, 10, dtype=torch.long), past_key_values=DynamicCache())
        assert press.routers.layers[0].down.weight.dtype == dtype


@pytest.mark.parametrize("other", [{"num_hidden_layers": 1}, {"hidden_size": 64}, {"vocab_size": 301}])
def test_a_router_file_of_another_model_is_refused(llama, tmp_path, other):
    path = saved(tiny_model("llama", **other), tmp_path)
    refuse(
        llama, MoERouterPress(experts=["knorm", "tova"], router=path), CheckpointError, "another|was made for|layers"
    )


def test_a_router_file_of_another_model_of_the_same_size_is_refused(llama, tmp_path):
    other = tiny_model("llama")
    torch.nn.init.normal_(other.model.layers[0].self_attn.o_proj.weight)
    press = MoERouterPress(experts=["knorm", "tova"], router=saved(other, tmp_path))
    with torch.no_grad(), press(other):
        other(torch.zeros(1, 10, dtype=torch.long), past_key_values=DynamicCache())
    refuse(llama, press, CheckpointError, "another model of the same size")


def test_a_router_file_for_other_experts_is_refused(llama, tmp_path):
    press = MoERouterPress(experts=["tova", "knorm"], router=saved(llama, tmp_path))
    refuse(llama, press, CheckpointError, r"Pass experts=\['knorm', 'tova'\]")


def test_a_missing_router_is_refused(llama, tmp_path):
    press = MoERouterPress(experts=["knorm", "tova"], router=tmp_path / "nowhere")
    refuse(llama, press, CheckpointError, "no directory here")
    with pytest.raises(CheckpointError):
        load_routers("no/such-router-on-the-hub")


def test_an_expert_that_fails_is_named_and_leaves_no_hooks(llama):
    def broken(*args):
        raise ZeroDivisionError("by zero")

    def wrong_shape(module, hidden_states, keys, *others):
        return keys.sum((1, 3))

    def not_a_number(module, hidden_states, keys, *others):
        return keys.sum(-1) * torch.nan

    for expert, text in ((broken, "by zero"), (wrong_shape, "shape"), (not_a_number, "NaN")):
        n_hooks = hooks(llama)
        press = MoERouterPress(experts=[expert, "knorm"])
        with pytest.raises(ExpertError, match=rf"'{expert.__name__}'.*{text}"), torch.no_grad(), press(llama):
            llama(torch.zeros(1, 10, dtype=torch.long), past_key_values=DynamicCache())
        assert hooks(llama) == n_hooks


def test_a_press_inside_its_own_block_is_refused_and_the_outer_block_goes_on(llama):
    press = MoERouterPress(0.5)
    with press(llama):
        with pytest.raises(UnsupportedInputError, match="in use on this model already"), press(llama):
            pass
        cache = DynamicCache()
        with torch.no_grad():
            llama(tokens(40), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [20, 20]
    prefill(llama, tokens(40), press)  # and it can be entered again


def test_attention_of_an_older_make_is_refused_by_name():
    """As Qwen2-MoE's and OLMoE's is in transformers 4.56: it does not pass through the attention interface."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        del layer.self_attn.scaling
    with pytest.raises(UnsupportedModelError, match="older make.*Install transformers 5.2"), MoERouterPress()(model):
        pass
