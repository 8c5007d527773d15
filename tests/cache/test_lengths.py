"""A compressed cache counts the tokens that were processed, under every budget: other code can go on with it."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kvpress import KnormPress
from kvpress.pipeline import KVPressTextGenerationPipeline
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, UnsupportedInputError, load_cache, save_cache
from kvpress_moe.cache.shortened_layer import ShortenedLayer
from kvpress_moe.model.transformers_api import KVPRESS_KNOWS, crop, with_cache
from tests.quantized import RoundedCache, quantized_lengths
from tests.tiny import byte_tokenizer, calibrated_routers, greedy, lengths, prefill, tiny_model, tokens

PROMPT, QUESTION, END = tokens(60), tokens(9, seed=5), {"eos_token_id": 999, "do_sample": False}
BUDGETS = ("uniform", "layer", "global")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def press(model, budget):
    if budget == "uniform":
        return MoERouterPress(0.5, num_experts=4, cache_aware=False)
    return MoERouterPress(0.5, router=calibrated_routers(model), budget=budget, cache_aware=False)


@pytest.fixture(params=BUDGETS)
def budget(request):
    return request.param


@pytest.fixture
def cache(model, budget):
    return prefill(model, PROMPT, press(model, budget))


def continued(model, cache, n_new=8):
    """What a loop with true positions writes after the question."""
    return greedy(model, QUESTION, copy.deepcopy(cache), 60, n_new)[0]


def test_the_length_is_the_number_of_tokens_that_were_processed(model, cache):
    assert cache.get_seq_length() == 60
    greedy(model, QUESTION, cache, 60, 3)
    assert {cache.get_seq_length(layer_idx) for layer_idx in range(2)} == {60 + 9 + 2}  # the last one is not read again


def test_generate_with_the_whole_history_goes_on_as_a_loop_with_true_positions(model, cache):
    expected = continued(model, cache)
    written = model.generate(torch.cat([PROMPT, QUESTION], 1), past_key_values=cache, max_new_tokens=8, **END)
    assert torch.equal(written[0, 69:], expected)


def test_a_loop_that_leaves_positions_to_the_model_is_right(model, cache):
    expected = continued(model, cache)
    found, token = [], QUESTION
    with torch.no_grad():
        for _ in range(8):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(int(token))
    assert found == expected.tolist()


def test_crop_goes_back_to_the_prompt_and_no_further(model, cache):
    expected = continued(model, cache)
    greedy(model, tokens(5, seed=7), cache, 60, 6)
    crop(cache, 62)
    assert cache.get_seq_length() == 62
    crop(cache, 60)
    assert cache.get_seq_length() == 60
    assert torch.equal(continued(model, cache), expected)
    with pytest.raises(UnsupportedInputError, match="at least the 60 tokens of the compressed prompt"):
        crop(cache, 59)


def test_a_saved_cache_serves_generate(model, cache, tmp_path):
    expected = continued(model, cache)
    save_cache(tmp_path / "prompt.kv", cache, model, PROMPT)
    loaded = load_cache(tmp_path / "prompt.kv", model).cache
    assert loaded.get_seq_length() == 60
    written = model.generate(torch.cat([PROMPT, QUESTION], 1), past_key_values=loaded, max_new_tokens=8, **END)
    assert torch.equal(written[0, 69:], expected)
    with pytest.raises(UnsupportedInputError, match="60 tokens"):
        crop(loaded, 30)


def test_copies_beams_and_batches_keep_the_length(model, cache):
    again = copy.deepcopy(cache)
    again.batch_repeat_interleave(3)
    again.reorder_cache(torch.tensor([2, 0, 1]))
    again.batch_select_indices(torch.tensor([0, 1]))
    assert again.get_seq_length() == 60
    expected = continued(model, cache)
    for row in greedy(model, QUESTION.expand(2, -1), again, 60, 8):
        assert torch.equal(row, expected)


def test_guidance_reads_a_negative_prompt_of_its_own(model, budget):
    """transformers keeps a second cache for it, whose positions come from the cache's length."""
    negative, scale, n_new = tokens(40, seed=8), 1.5, 6
    with torch.no_grad(), press(model, budget)(model):
        written = model.generate(
            PROMPT, negative_prompt_ids=negative, guidance_scale=scale, max_new_tokens=n_new, **END
        )[0, 60:]
    caches, scores = [], []
    with torch.no_grad(), press(model, budget)(model):
        for prompt in (PROMPT, negative):
            caches.append(DynamicCache())
            scores.append(model(prompt, past_key_values=caches[-1]).logits[:, -1].log_softmax(-1))
    expected = []
    with torch.no_grad():
        for step in range(n_new):
            token = (scale * (scores[0] - scores[1]) + scores[1]).argmax(-1)[:, None]
            expected.append(int(token))
            for number, n_read in enumerate((60, 40)):
                position = torch.tensor([[n_read + step]])
                logits = model(token, past_key_values=caches[number], position_ids=position).logits
                scores[number] = logits[:, -1].log_softmax(-1)
    assert written.tolist() == expected


@pytest.mark.parametrize("drafts", ["assistant", "prompt lookup"])
def test_drafts_after_the_prefill_change_nothing_and_inside_the_block_are_refused(model, cache, budget, drafts):
    how = {"assistant_model": tiny_model("llama", num_hidden_layers=1)} if drafts == "assistant" else {}
    how |= {"prompt_lookup_num_tokens": 4} if drafts == "prompt lookup" else {}
    history = torch.cat([PROMPT, QUESTION], 1)
    expected = model.generate(history, past_key_values=copy.deepcopy(cache), max_new_tokens=20, **END)
    if KVPRESS_KNOWS:
        drafted = model.generate(history, past_key_values=cache, max_new_tokens=20, **END, **how)
        assert torch.equal(drafted[:, : expected.shape[1]], expected)
    else:  # transformers 5.24 reads the history twice, with a full cache too
        with pytest.raises(UnsupportedInputError, match="with a compressed cache in transformers"):
            model.generate(history, past_key_values=cache, max_new_tokens=20, **END, **how)
    with (
        pytest.raises(UnsupportedInputError, match="got assisted decoding or prompt lookup inside the block"),
        torch.no_grad(),
        press(model, budget)(model),
    ):
        model.generate(PROMPT, max_new_tokens=20, **END, **how)


def test_the_pipeline_takes_every_answer_off_again(model, budget):
    tokenizer = byte_tokenizer()
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    text, cache = "The code of the old safe is 7194. " * 2, DynamicCache()
    questions = ["What is it?", "Where?", "What is it?"]
    answers = pipeline(text, questions=questions, press=press(model, budget), max_new_tokens=6, cache=cache)["answers"]
    n_context = pipeline.preprocess(text, questions, "", 4096)["context_ids"].shape[1]
    assert answers[0] == answers[2]
    assert cache.get_seq_length() == n_context
    if budget == "uniform":
        assert lengths(cache) == [n_context // 2] * 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_that_slide_after_full_ones_have_the_right_positions(family, budget):
    model = tiny_model(family, num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=byte_tokenizer())
    text, question = "The code of the old safe is 7194. " * 4, "What is it?"
    got = pipeline(text, question=question, press=press(model, budget), max_new_tokens=8)["answer"]
    ids = pipeline.preprocess(text, [question], "", 4096)
    cache = prefill(model, ids["context_ids"], press(model, budget))
    n_context = ids["context_ids"].shape[1]
    assert {cache.get_seq_length(layer_idx) for layer_idx in range(3)} == {n_context}
    expected = greedy(model, ids["questions_ids"][0], cache, n_context, 8)[0]
    assert got == pipeline.tokenizer.decode(expected, skip_special_tokens=True)


ASK = """
import sys
from tests.tiny import byte_tokenizer, tiny_model
from kvpress.pipeline import KVPressTextGenerationPipeline
from kvpress_moe.cache import load_cache
from kvpress_moe.cache.answering import answer_each

model = tiny_model("llama")
pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=byte_tokenizer())
saved = load_cache(sys.argv[1], model)
questions = pipeline.preprocess("", ["What is it?", "Where?", "What is it?"], "", 4096)["questions_ids"]
before = saved.cache.get_seq_length()
answers = answer_each(pipeline, saved.cache, questions, saved.n_tokens, 6)
assert answers[0] == answers[2], answers
assert saved.cache.get_seq_length() == before
"""


def test_a_loaded_cache_answers_alike_where_no_press_was_ever_made(model, cache, tmp_path):
    save_cache(tmp_path / "book.kv", cache, model, PROMPT)
    command = [sys.executable, "-W", "ignore", "-c", ASK, tmp_path / "book.kv"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_outside", [True, False])
def test_presses_of_kvpress_in_the_same_block_count_too(model, is_outside):
    presses = [KnormPress(0.5), press(model, "uniform")]
    outer, inner = presses if is_outside else reversed(presses)
    cache = DynamicCache()
    with torch.no_grad(), outer(model), inner(model):
        model.model(PROMPT, **with_cache(cache))
    assert lengths(cache) == [15, 15]
    assert cache.get_seq_length() == 60
    expected = continued(model, cache)
    written = model.generate(torch.cat([PROMPT, QUESTION], 1), past_key_values=cache, max_new_tokens=8, **END)
    assert torch.equal(written[0, 69:], expected)


def test_several_answers_from_layers_with_windows_leave_no_trace(budget):
    """A layer that holds a window only cannot be cut to its former length: the oldest pairs are gone."""
    model = tiny_model("gemma3_text")
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=byte_tokenizer())
    text, questions = "The code of the old safe is 7194. " * 4, ["What is it?", "Where?", "What is it?"]

    def answers(cache):
        return pipeline(text, questions=questions, press=press(model, budget), max_new_tokens=6, cache=cache)["answers"]

    expected = answers(DynamicCache())
    assert expected[0] == expected[2]
    assert answers(DynamicCache(config=model.config)) == expected


@pytest.mark.parametrize("residual_length", [1, 32, 128])
def test_several_answers_from_a_quantised_cache_leave_no_trace(model, residual_length):
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=byte_tokenizer())
    text, questions = "The code of the old safe is 7194. " * 2, ["What is it?", "Where?", "What is it?"]
    cache = RoundedCache(2, residual_length)
    answers = pipeline(text, questions=questions, press=press(model, "uniform"), max_new_tokens=6, cache=cache)[
        "answers"
    ]
    assert answers[0] == answers[2]
    assert quantized_lengths(cache) == [34, 34]
    assert quantized_lengths(pickle.loads(pickle.dumps(cache))) == [34, 34]


def test_a_crop_to_more_than_there_is_changes_nothing(cache):
    crop(cache, 100)
    assert cache.get_seq_length() == 60


def test_wrappers_that_compress_again_count_pairs(model):
    """A wrapper that asks this press stores the pairs itself; kvpress's decoding presses read their number."""
    from kvpress import ComposedPress

    wrapped = prefill(model, PROMPT, ComposedPress([press(model, "uniform"), press(model, "uniform")]))
    assert lengths(wrapped) == [15, 15]
    assert all(isinstance(layer, ShortenedLayer) and not layer.n_evicted for layer in wrapped.layers)
