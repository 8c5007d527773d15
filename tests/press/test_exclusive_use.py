"""Two presses, two models, two threads, two processes: each works, or is refused by name."""

import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from kvpress import AdaKVPress, KnormPress
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, UnsupportedInputError
from tests.tiny import calibrated_routers, lengths, prefill, tiny_model, tokens

PROMPT, OTHER = tokens(40, seed=1), tokens(60, seed=2)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def twin():
    """Another model of the same size."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2, generator=generator)
    return model


def shared(llama, budget="global"):
    return MoERouterPress(0.5, router=calibrated_routers(llama, ("keydiff", "cur", "knorm")), budget=budget)


def kept(cache):
    """What a cache holds, to compare."""
    return [getattr(layer, "flat_keys", layer.keys).tolist() for layer in cache.layers]


# ── one after the other ──────────────────────────────────────────────────────────────────────────────────────────────


def test_two_presses_on_one_model_one_after_the_other(llama):
    first, second = shared(llama), MoERouterPress(0.75)
    alone = [kept(prefill(llama, PROMPT, press)) for press in (shared(llama), MoERouterPress(0.75))]
    assert [kept(prefill(llama, PROMPT, press)) for press in (first, second)] == alone
    assert first.get_stats()["forward_count"] == second.get_stats()["forward_count"] == 1


def test_one_press_on_two_models_one_after_the_other(llama, twin):
    press = MoERouterPress(0.5)
    prefill(llama, OTHER, press)
    assert kept(prefill(twin, PROMPT, press)) == kept(prefill(twin, PROMPT, MoERouterPress(0.5)))
    assert kept(prefill(llama, PROMPT, press)) == kept(prefill(llama, PROMPT, MoERouterPress(0.5)))
    assert press.get_stats()["forward_count"] == 3


# ── at once ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_press_on_two_models_at_once_is_refused_and_the_outer_block_goes_on(llama, twin):
    press = shared(llama)
    with torch.no_grad(), press(llama):
        with pytest.raises(UnsupportedInputError, match="^press: .*another model.*'MainThread'"), press(twin):
            pass
        cache = prefill(llama, PROMPT)
    assert kept(cache) == kept(prefill(llama, PROMPT, shared(llama)))
    assert not twin.model._forward_pre_hooks


def test_two_of_our_presses_on_one_model_at_once_are_refused_and_the_outer_block_goes_on(llama):
    inner = MoERouterPress(0.5)
    with torch.no_grad(), shared(llama)(llama):
        with pytest.raises(UnsupportedInputError, match="^model: another MoERouterPress"), inner(llama):
            pass
        cache = prefill(llama, PROMPT)
    assert kept(cache) == kept(prefill(llama, PROMPT, shared(llama)))
    prefill(llama, PROMPT, inner)  # was left free


@pytest.mark.parametrize("ours_outside", [True, False])
@pytest.mark.parametrize(
    ("budget", "other", "refused"),
    [
        ("uniform", KnormPress(0.5), (None, None)),
        ("uniform", AdaKVPress(KnormPress(0.5)), (None, "masks pairs of layer 0")),
        ("layer", KnormPress(0.5), ("heads of different lengths", None)),
        ("layer", AdaKVPress(KnormPress(0.5)), ("heads of different lengths", "masks pairs of layer 0")),
        ("global", KnormPress(0.5), ("evicted pairs of layer 0", None)),
        ("global", AdaKVPress(KnormPress(0.5)), ("heads of different lengths", "masks pairs of layer 0")),
    ],
)
def test_a_press_of_kvpress_on_the_same_model_at_once(budget, other, refused, ours_outside):
    """As two presses of kvpress: the inner one compresses what the outer one left; or it is said why not."""
    llama = tiny_model("llama")  # kvpress's presses leave traces
    ours, reason = shared(llama, budget), refused[not ours_outside]
    outer, inner = (ours, other) if ours_outside else (other, ours)
    cache = DynamicCache()
    if reason:
        with pytest.raises((UnsupportedInputError, AttributeError), match=reason), outer(llama):
            prefill(llama, PROMPT, inner, cache)
        assert cache.get_seq_length() == 0
    else:
        with outer(llama):
            prefill(llama, PROMPT, inner, cache)
        if budget == "uniform":
            assert lengths(cache) == [10, 10] if isinstance(other, KnormPress) else [20, 20]
        else:
            assert sum(sum(layer.lengths[0]) for layer in cache.layers) == 10 * 4


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_another_thread(work):
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(work).result()


def test_threads_with_a_press_and_a_model_each_do_not_disturb_each_other(llama, twin):
    def read(model):
        press = MoERouterPress(0.5)
        return [kept(prefill(model, tokens(50, seed=seed), press)) for seed in range(5)], repr(press.get_stats())

    alone = [read(model) for model in (llama, twin)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, (llama, twin))) == alone


def test_a_press_or_a_model_that_another_thread_holds_is_refused(llama, twin):
    press = shared(llama)
    with press(llama):
        for ours, model, text in (
            (press, twin, "^press: .*another model"),
            (press, llama, "^press: .*this model already"),
            (MoERouterPress(0.5), llama, "^model: another"),
        ):
            with pytest.raises(UnsupportedInputError, match=text + ".*thread 'MainThread'"):
                in_another_thread(lambda ours=ours, model=model: prefill(model, PROMPT, ours))
        cache = prefill(llama, PROMPT)
    assert kept(cache) == kept(prefill(llama, PROMPT, shared(llama)))


def test_threads_inside_one_block_may_take_turns(llama):
    """As with a TextIteratorStreamer: the block is opened here, `generate` runs there."""
    press = shared(llama)
    with press(llama):
        first = in_another_thread(lambda: prefill(llama, PROMPT))
        with pytest.raises(RuntimeError):
            in_another_thread(lambda: prefill(llama, torch.zeros(1, 2, 3, dtype=torch.long)))
        second = prefill(llama, PROMPT)
    again = shared(llama)
    assert [kept(first), kept(second)] == [kept(prefill(llama, PROMPT, again)) for _ in range(2)]


def test_threads_that_read_at_once_inside_one_block_are_refused_and_the_first_one_goes_on(llama):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)

    press = shared(llama)
    hook = llama.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool, press(llama):
        first = pool.submit(prefill, llama, PROMPT)
        assert inside.wait(60)
        cache = DynamicCache()
        with pytest.raises(UnsupportedInputError, match="^model: thread 'first_0' is reading"):
            prefill(llama, OTHER, None, cache)
        assert cache.get_seq_length() == 0
        go_on.set()
        first = first.result()
    hook.remove()
    assert kept(first) == kept(prefill(llama, PROMPT, shared(llama)))


def test_a_block_that_is_left_while_a_thread_reads_says_so(llama):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args):
        inside.set()
        assert go_on.wait(60)

    hook = llama.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool:
        block = shared(llama)(llama)
        block.__enter__()
        reading = pool.submit(prefill, llama, PROMPT)
        assert inside.wait(60)
        with pytest.raises(UnsupportedInputError, match="left while thread 'first_0' was still reading"):
            block.__exit__(None, None, None)
        hook.remove()
        go_on.set()
        reading.result()
    assert not llama.model._forward_pre_hooks


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_here(press, pipe):
    torch.set_num_threads(1)
    llama = tiny_model("llama")
    pipe.send((kept(prefill(llama, PROMPT, press)), repr(press.get_stats())))
    pipe.close()


def test_a_press_travels_to_a_spawned_process_with_routers_feedback_and_counts(llama):
    press = shared(llama)
    prefill(llama, OTHER, press)
    here, there = multiprocessing.get_context("spawn").Pipe(False)
    with press(llama):  # in use here, free there
        process = multiprocessing.get_context("spawn").Process(target=read_here, args=(press, there))
        process.start()
        there.close()
        found, stats = here.recv()
        process.join()
    assert process.exitcode == 0
    assert found == kept(prefill(llama, PROMPT, press))
    assert stats == repr(press.get_stats())


@pytest.mark.parametrize("copy", [deepcopy, lambda press: pickle.loads(pickle.dumps(press))])
def test_a_copy_of_a_press_that_is_at_work_is_free_and_goes_its_own_way(llama, twin, copy):
    press = shared(llama)
    with press(llama):
        prefill(llama, OTHER)
        other = copy(press)
    assert kept(prefill(llama, PROMPT, other)) == kept(prefill(llama, PROMPT, press))
    counted = repr(press.get_stats())
    assert repr(other.get_stats()) == counted
    prefill(llama, OTHER, other)
    assert repr(press.get_stats()) == counted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("at_work", [False, True])
def test_a_press_inherited_through_fork_serves_the_child_and_not_the_parent(llama, at_work):
    """A press in use is in use in the child as well, on the child's copy of the model."""

    def read_in_child():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                found = kept(prefill(llama, PROMPT, None if at_work else press))
                with os.fdopen(writer, "wb") as pipe:
                    pickle.dump((found, press.get_stats()["forward_count"]), pipe)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            found = pickle.load(pipe)
        os.waitpid(child, 0)
        return found

    press = shared(llama)
    prefill(llama, OTHER, press)
    if at_work:
        with press(llama):
            found, counted = read_in_child()
    else:
        found, counted = read_in_child()
    assert (counted, press.get_stats()["forward_count"]) == (2, 1)
    assert found == kept(prefill(llama, PROMPT, press))
