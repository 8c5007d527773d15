"""Whatever fails inside a press, at any stage of any layer: the model is as it was, and the failed prompt never was."""

import os
import sys
from contextlib import contextmanager
from copy import deepcopy
from pkgutil import resolve_name

import pytest
import torch
from kvpress import ChunkPress
from transformers import DynamicCache

from kvpress_moe import ExpertError, MoERouterPress
from kvpress_moe.press.exclusive_use import _HELD
from tests.tiny import calibrated_routers, prefill, tiny_model, tokens

#: `make faults` raises every exception at every call; the suite takes the exceptions in turn.
ALL = "ALL_FAULTS" in os.environ
EXCEPTIONS = (ZeroDivisionError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError)
PROMPT, FAILING, NEXT = tokens(30, seed=1), tokens(40, seed=2), tokens(36, seed=3)

#: What a prompt goes through, first to last. The last ones are reached with a shared or a uniform budget only.
STAGES = (
    "kvpress_moe.press.session.forward_arguments",
    "kvpress_moe.press.session.checkpoint",
    "kvpress_moe.press.session.check_forward",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward",
    "transformers.models.llama.modeling_llama.LlamaAttention.forward",
    "transformers.models.llama.modeling_llama.LlamaMLP.forward",
    "transformers.cache_utils.DynamicLayer.update",
    "kvpress_moe.press.moe_router_press.MoERouterPress.forward_hook",
    "kvpress_moe.press.moe_router_press.MoERouterPress.compress",
    "kvpress_moe.model.projection_cache.ProjectionCache.of",
    "kvpress_moe.press.moe_router_press.MoERouterPress.route",
    "kvpress_moe.routers.routers.Routers.place",
    "kvpress_moe.routers.base.BaseMoERouter.forward",
    "kvpress_moe.routers.base.gate",
    "kvpress_moe.press.routing_memory.RoutingMemory.align",
    "kvpress_moe.press.moe_router_press.active_experts",
    "kvpress_moe.press.statistics.RoutingStats.add",
    "kvpress_moe.press.moe_router_press.MoERouterPress.mix",
    "kvpress_moe.experts.expert.Expert.score",
    "kvpress_moe.experts.layer_call.window_attention_mass",
    "kvpress_moe.press.moe_router_press.check_all_finite",
    "kvpress_moe.press.moe_router_press.MoERouterPress.n_kept",
    "kvpress_moe.press.moe_router_press.MoERouterPress.record",
    "kvpress_moe.routers.pikv.PiKVMoERouter.observe",
    "kvpress_moe.press.moe_router_press.fit_masks",
    "kvpress_moe.press.moe_router_press.select",
    "kvpress_moe.press.moe_router_press.evict",
    "kvpress_moe.press.moe_router_press.MoERouterPress._evict",
    "kvpress_moe.press.evicted_keys.EvictedKeys.keep",
    "kvpress_moe.press.shared_eviction.check_can_turn_ragged",
    "kvpress_moe.budget.cross_layer.SharedBudget.add",
    "kvpress_moe.budget.cross_layer.SharedBudget.decide",
    "kvpress_moe.budget.cross_layer.share",
    "kvpress_moe.press.shared_eviction.RaggedLayer.from_dense",
    "kvpress_moe.press.shared_eviction.fit_masks",
)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def count():
    """How many faults were injected; shown by `pytest -s`."""
    count = {"faults": 0}
    yield count
    print(f"\n{count['faults']} faults injected")


@pytest.fixture(scope="module")
def untouched(llama):
    """The model's attributes before it meets the first press."""
    return everything(llama)


@pytest.fixture(scope="module", params=["layer", "global", "tracked"])
def begun(request, llama, untouched):
    """A press that has read one prompt, to be copied; and what a second one leaves of the copy and in the cache."""
    if request.param == "tracked":
        press = MoERouterPress(0.5, num_experts=3, track_misses=True)
    else:
        press = MoERouterPress(0.5, router=calibrated_routers(llama), budget=request.param)
    prefill(llama, PROMPT, press)
    undisturbed = deepcopy(press)
    expected = answer(llama, prefill(llama, NEXT, undisturbed))
    return press, expected, state(undisturbed)


def everything(model):
    """Names of all attributes, submodules and hooks of every module; kvpress itself sets masks to None."""
    return {
        (name, kind, key)
        for name, module in model.named_modules()
        for kind, keys in vars(module).items()
        for key in (keys if isinstance(keys, (dict, set)) else [None])
        if kind != "masked_key_indices" or keys is not None
    }


def state(press):
    """All that a press knows of earlier prompts."""
    return repr((press.get_stats(), [rates.tolist() for rates in press.routers.buffers()], press._shared._waiting))


@torch.no_grad()
def answer(model, cache):
    return model(tokens(5, seed=9), past_key_values=cache, position_ids=torch.arange(40, 45)[None]).logits


@contextmanager
def failing(monkeypatch, stage, at_call=None, error=None):
    """Count the calls of a stage, and raise at one of them."""
    calls = []
    path, _, name = stage.rpartition(".")
    owner = resolve_name(path)
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls.append(stage)
        if len(calls) - 1 == at_call:
            raise error("injected")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield calls


@pytest.mark.parametrize("stage", STAGES)
def test_a_prompt_that_fails_at_any_stage_of_any_layer_never_was(llama, untouched, monkeypatch, count, begun, stage):
    expected = answer(llama, prefill(llama, FAILING))
    press = deepcopy(begun[0])
    before = state(press)
    with failing(monkeypatch, stage) as calls:
        prefill(llama, FAILING, deepcopy(press))
    cache = DynamicCache()
    for at_call in range(len(calls)):
        for error in EXCEPTIONS if ALL else (EXCEPTIONS[at_call % 4],):
            errors = (error, ExpertError)  # that an expert failed is said by the package
            with failing(monkeypatch, stage, at_call, error), pytest.raises(errors, match="injected"):
                prefill(llama, FAILING, press, cache)
            assert cache.get_seq_length() == 0
            assert state(press) == before
            assert press._session.projections._projected == {}
            assert everything(llama) == untouched
            count["faults"] += 1
    assert not _HELD
    assert torch.equal(answer(llama, prefill(llama, FAILING)), expected)
    assert torch.equal(answer(llama, prefill(llama, NEXT, press, cache)), begun[1])
    assert state(press) == begun[2]


def test_every_stage_is_reached(llama, monkeypatch):
    presses = (
        MoERouterPress(0.5, router=calibrated_routers(llama)),
        MoERouterPress(0.5, num_experts=2),
        MoERouterPress(0.5, num_experts=2, track_misses=True),
    )
    for stage in STAGES:
        with failing(monkeypatch, stage) as calls:
            for press in presses:
                prefill(llama, PROMPT, press)
        assert calls, stage


def test_ctrl_c_at_any_call_inside_the_package_leaves_no_trace(llama, untouched, count, begun):
    """Entering and leaving the block included: the profiler raises at the n-th call of all."""
    press = deepcopy(begun[0])
    before, calls, at_call = state(press), [], None

    def interrupt(frame, event, argument):
        code = frame.f_code
        inside = event == "call" and "/kvpress_moe/" in code.co_filename
        if inside and code.co_name != "<genexpr>":  # may be called to be closed, where nothing can be raised
            calls.append(code.co_qualname)
            if len(calls) - 1 == at_call:
                raise KeyboardInterrupt

    def read_interrupted(press):
        calls.clear()
        try:
            sys.setprofile(interrupt)
            prefill(llama, FAILING, press)
        finally:
            sys.setprofile(None)

    whole = deepcopy(press)
    read_interrupted(whole)
    every = list(calls)
    for at_call in range(0, len(every), 1 if ALL else 29):
        with pytest.raises(KeyboardInterrupt):
            read_interrupted(press)
        count["faults"] += 1
        assert everything(llama) == untouched, every[at_call]
        assert not _HELD, every[at_call]
        if state(press) != before:  # Ctrl-C came when the prompt had been read and the block was being left
            assert state(press) == state(whole), every[at_call]
            press = deepcopy(begun[0])
    assert torch.equal(answer(llama, prefill(llama, NEXT, press)), begun[1])
    assert state(press) == begun[2]


@pytest.mark.parametrize("error", EXCEPTIONS)
def test_a_failure_that_is_caught_inside_the_block_leaves_the_block_usable(llama, monkeypatch, begun, error):
    press, cache = deepcopy(begun[0]), DynamicCache()
    before = state(press)
    with failing(monkeypatch, STAGES[6], 2, error), torch.no_grad(), press(llama):  # the last layer's update
        with pytest.raises(error):
            llama.model(FAILING, past_key_values=cache)
        if (
            error is not KeyboardInterrupt
        ):  # torch calls hooks after an Exception alone; Ctrl-C is undone by what follows
            assert state(press) == before
        llama.model(NEXT, past_key_values=cache)
    assert torch.equal(answer(llama, cache), begun[1])
    assert state(press) == begun[2]


@pytest.mark.parametrize("error", EXCEPTIONS)
def test_a_generated_token_that_fails_is_not_half_counted(llama, monkeypatch, error):
    """Its cache stays as transformers leaves it: the prompt's pairs are all there."""
    press = MoERouterPress(0.5, num_experts=2, track_misses=True)
    with torch.no_grad(), press(llama):
        cache = DynamicCache()
        llama.model(PROMPT, past_key_values=cache)
        before = state(press)
        with failing(monkeypatch, "kvpress_moe.press.evicted_keys.EvictedKeys.masses", 1, error), pytest.raises(error):
            llama.model(tokens(1), past_key_values=cache)
    assert state(press) == before


def test_counts_inside_a_wrapper_are_made_as_the_work_is_done(llama, monkeypatch):
    """A wrapper calls the press layer by layer; nobody tells it where a prompt ends."""
    press = MoERouterPress(0.5, num_experts=2)
    with failing(monkeypatch, STAGES[6], 2, MemoryError), pytest.raises(MemoryError):
        prefill(llama, PROMPT, ChunkPress(press, chunk_length=20))
    assert sorted(press.get_stats()["layer_stats"]) == [0, 1]
