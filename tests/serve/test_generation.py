"""Tokens come one by one from a cache that stays as it is; text is cut at stop texts and never inside a character."""

import pytest
import torch
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.serve.generation import Sampling, TextOfTokens, borrowed, draw, generate
from tests.tiny import prefill, tokens


def greedy(model, input_ids, n):
    with torch.no_grad():
        return model.generate(input_ids, max_new_tokens=n, do_sample=False)[0, input_ids.shape[1] :].tolist()


def test_greedy_tokens_are_those_of_generate(llama):
    whole = tokens(70)
    cache = prefill(llama, whole[:, :60])
    found = list(generate(llama, cache, 60, whole[0, 60:].tolist(), Sampling(8, temperature=0), frozenset()))
    assert found == greedy(llama, whole, 8)


@pytest.mark.parametrize("settings", [None, {"budget": "global"}, {"budget": "global", "precision": "mixed"}])
def test_a_borrowed_cache_grows_and_the_original_stays(llama, settings):
    press = None if settings is None else MoERouterPress(0.5, experts=["expected_attention"], **settings)
    cache = prefill(llama, tokens(60), press)
    answers = []
    for _ in range(3):
        own = borrowed(cache)
        answers.append(list(generate(llama, own, 60, [5, 6, 7], Sampling(6, temperature=0), frozenset())))
        assert own.get_seq_length() == 60 + 3 + 5  # the last token is not read any more
        assert cache.get_seq_length() == 60
    assert answers[0] == answers[1] == answers[2]


def test_two_answers_that_take_turns_do_not_mix(llama):
    cache = prefill(llama, tokens(60), MoERouterPress(0.5, experts=["expected_attention"], budget="global"))

    def answer(first):
        return generate(llama, borrowed(cache), 60, [first, 9], Sampling(6, temperature=0), frozenset())

    alone = [list(answer(first)) for first in (4, 5)]
    both = [answer(first) for first in (4, 5)]
    mixed = [[next(one) for one in both] for _ in range(6)]
    assert [list(column) for column in zip(*mixed, strict=True)] == alone


def test_an_end_token_ends_the_answer(llama):
    cache = prefill(llama, tokens(60))
    first, second, *_ = generate(llama, borrowed(cache), 60, [5], Sampling(4, temperature=0), frozenset())
    found = list(generate(llama, borrowed(cache), 60, [5], Sampling(4, temperature=0), frozenset([second])))
    assert found == [first, None]


def test_a_seed_gives_the_same_tokens_and_top_p_leaves_out_unlikely_ones(llama):
    def answer(seed):
        sampling = Sampling(12, temperature=1.0, top_p=0.9, seed=seed)
        return list(generate(llama, DynamicCache(), 0, tokens(20)[0].tolist(), sampling, frozenset()))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
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
