"""Tokens are drawn as they should be, from a cache that stays as it is; text is cut at stop texts only."""

from contextlib import suppress

import pytest
import torch
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache import read_together
from kvpress_moe.serve.generation import Sampling, TextOfTokens, borrowed, draw, generator_of
from kvpress_moe.serve.work import read_in_chunks
from tests.tiny import prefill, tokens


def greedy(model, input_ids, n):
    with torch.no_grad():
        return model.generate(input_ids, max_new_tokens=n, do_sample=False)[0, input_ids.shape[1] :].tolist()


def answer(model, cache, input_ids, n, sampling=None):
    """Tokens of an answer: drawn from the logits that are asked for."""
    sampling = sampling or Sampling(n, temperature=0)
    chance, tokens, asked = generator_of(sampling), [], input_ids
    for _ in range(n):
        steps, logits = read_in_chunks(cache, asked, chunk=4), None
        with suppress(StopIteration):
            while True:
                want = steps.send(logits)
                logits = read_together(model, [want.cache], [want.input_ids])[0]
        tokens.append(draw(logits, sampling, chance))
        asked = tokens[-1:]
    return tokens


def test_greedy_tokens_are_those_of_generate(llama):
    whole = tokens(70)
    cache = prefill(llama, whole[:, :60])
    assert answer(llama, cache, whole[0, 60:].tolist(), 8) == greedy(llama, whole, 8)


@pytest.mark.parametrize("settings", [None, {"budget": "global"}, {"budget": "global", "precision": "mixed"}])
def test_a_borrowed_cache_grows_and_the_original_stays(llama, settings):
    press = None if settings is None else MoERouterPress(0.5, experts=["expected_attention"], **settings)
    cache = prefill(llama, tokens(60), press)
    answers = []
    for _ in range(3):
        own = borrowed(cache)
        answers.append(answer(llama, own, [5, 6, 7], 6))
        assert own.get_seq_length() == 60 + 3 + 5  # the last token is not read any more
        assert cache.get_seq_length() == 60
    assert answers[0] == answers[1] == answers[2]


def test_a_seed_gives_the_same_tokens_and_top_p_leaves_out_unlikely_ones(llama):
    def of_seed(seed):
        sampling = Sampling(12, temperature=1.0, top_p=0.9, seed=seed)
        return answer(llama, DynamicCache(), tokens(20)[0].tolist(), 12, sampling)

    assert of_seed(1) == of_seed(1)
    assert of_seed(1) != of_seed(2)
    logits = torch.tensor([2.0, 1.9, -5.0, -6.0])
    drawn = {draw(logits, Sampling(1, top_p=0.9), torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert drawn == {0, 1}
    assert draw(logits, Sampling(1, temperature=0), torch.Generator()) == 0


def pieces(tokenizer, text, stop=()):
    made = TextOfTokens(tokenizer, stop)
    found = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        found.append(made.add(token))
        if made.is_stopped:
            break
    return [*found, made.rest()], made.is_stopped


def test_no_half_of_a_character_is_given_out(tokenizer):
    found, _ = pieces(tokenizer, "Zürich, 北京 🙂.")
    assert "".join(found) == "Zürich, 北京 🙂."
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one twin three", ["two"], "one twin three"),
        ("one two", ["two three"], "one two"),
        ("aab aac", ["ac", "b "], "aa"),
        ("abc", [], "abc"),
    ],
)
def test_text_ends_before_a_stop_text_and_none_of_it_is_given_out(tokenizer, text, stop, expected):
    found, stopped = pieces(tokenizer, text, stop)
    assert "".join(found) == expected
    assert stopped == (expected != text)
