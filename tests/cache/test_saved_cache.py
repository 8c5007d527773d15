"""A cache on disk answers as the live one did; what is not whole or not of this model is refused."""

import pytest
import torch
from transformers import DynamicCache

from kvpress_moe import CheckpointError, MoERouterPress, UnsupportedInputError, load_cache, save_cache
from kvpress_moe.cache.prefill import cache_bytes
from tests.tiny import greedy, prefill, tiny_model, tokens

PROMPT = 90


def press(budget):
    return MoERouterPress(experts=["expected_attention"], budget=budget)


@pytest.mark.parametrize("budget", ["uniform", "layer", "global", None])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_cache_answers_token_for_token_as_the_live_one(tmp_path, family, budget, dtype):
    model = tiny_model(family, dtype=dtype)
    live = prefill(model, tokens(PROMPT), press(budget) if budget else None)
    path = save_cache(tmp_path / "book.kv", live, model, tokens(PROMPT), press(budget or "uniform"))
    loaded = load_cache(path, model)
    assert (loaded.n_tokens, loaded.recipe) == (PROMPT, repr(press(budget or "uniform")))
    assert cache_bytes(loaded.cache) == cache_bytes(live)
    for seed in (1, 2):
        question = tokens(4, seed=seed)
        assert torch.equal(
            *(greedy(model, question, cache, PROMPT + 4 * (seed - 1), 6) for cache in (loaded.cache, live))
        )


def test_tokens_that_came_after_the_prompt_are_saved_too(tmp_path, llama):
    live = prefill(llama, tokens(PROMPT), press("global"))
    with torch.no_grad():
        llama(tokens(3, seed=1), past_key_values=live)
        loaded = load_cache(save_cache(tmp_path / "book.kv", live, llama, tokens(PROMPT)), llama).cache
        assert loaded.get_seq_length() == PROMPT + 3
        new = tokens(2, seed=2)
        assert torch.equal(llama(new, past_key_values=loaded).logits, llama(new, past_key_values=live).logits)


@pytest.fixture
def book(tmp_path, llama):
    return save_cache(tmp_path / "book.kv", prefill(llama, tokens(PROMPT), press("global")), llama, tokens(PROMPT))


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "header altered", "empty", "missing", "another file"])
def test_a_damaged_file_is_refused(book, llama, damage):
    content = bytearray(book.read_bytes())
    if damage == "truncated":
        content = content[:-10]
    elif damage == "a bit flipped":
        content[-100] ^= 1
    elif damage == "header altered":
        content = content.replace(b"uniform", b"unifirm").replace(f"{PROMPT}".encode(), f"{PROMPT + 1}".encode(), 1)
    elif damage == "empty":
        content = b""
    elif damage == "another file":
        content = b"Once upon a time there was a cache."
    book.write_bytes(content)
    if damage == "missing":
        book.unlink()
    with pytest.raises(CheckpointError, match="cache: .*Compress the text again"):
        load_cache(book, llama)


def test_a_cache_of_another_model_is_refused(book):
    other = tiny_model("llama")
    torch.nn.init.normal_(other.model.layers[0].self_attn.o_proj.weight)
    with pytest.raises(CheckpointError, match="cache: .*another model of the same size"):
        load_cache(book, other)
    with pytest.raises(CheckpointError, match="cache: .*num_hidden_layers"):
        load_cache(book, tiny_model("llama", num_hidden_layers=3))


def test_a_fine_tune_of_the_model_is_refused_since_its_pairs_would_be_others(book):
    tuned = tiny_model("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    with pytest.raises(CheckpointError, match="another model of the same size"):
        load_cache(book, tuned)


def test_a_failed_save_leaves_the_old_file(book, llama, monkeypatch):
    before = book.read_bytes()

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("kvpress_moe.cache.saved_cache.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_cache(book, prefill(llama, tokens(PROMPT)), llama, tokens(PROMPT))
    assert book.read_bytes() == before
    assert [path.name for path in book.parent.iterdir()] == ["book.kv"]


def test_layers_that_cannot_be_stored_are_refused(tmp_path):
    model = tiny_model("gemma3_text")
    cache = prefill(model, tokens(PROMPT), None, DynamicCache(config=model.config))
    with pytest.raises(UnsupportedInputError, match="DynamicSlidingWindowLayer"):
        save_cache(tmp_path / "book.kv", cache, model, tokens(PROMPT))
    assert list(tmp_path.iterdir()) == []
