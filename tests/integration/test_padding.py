"""Batches padded on the left: padding never stays, and every row gives what it gives alone, in every family."""

import pytest
import torch
from kvpress.utils import compute_n_kept
from transformers import DynamicCache, QuantizedCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache import RaggedLayer
from kvpress_moe.errors import UnsupportedInputError
from tests.tiny import FAMILIES, padded_tokens, prefill, tiny_model, tokens

LENGTHS = (100, 77, 93, 9)
N_NEW = 6


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def generate(model, input_ids, mask=None, **settings):
    return model.generate(
        input_ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, return_dict_in_generate=True, **settings
    )


def together_and_alone(model, press, **settings):
    """The new tokens (B, N) of a padded batch and of its rows alone, and the caches they left."""
    with press(model):
        together = generate(model, *padded_tokens(LENGTHS), **settings)
        alone = [generate(model, tokens(length, seed=row), **settings) for row, length in enumerate(LENGTHS)]
    rows = torch.cat([answer.sequences[:, -N_NEW:] for answer in alone])
    return together.sequences[:, -N_NEW:], rows, together.past_key_values, [a.past_key_values for a in alone]


def ragged(cache):
    return [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]


@pytest.mark.parametrize("budget", ["uniform", "layer", "global"])
@pytest.mark.parametrize("experts", [["expected_attention"], ["leverage", "selective", "tova"]], ids=["one", "three"])
def test_padded_rows_answer_as_they_answer_alone(model, budget, experts):
    press = MoERouterPress(experts=experts, budget=budget, cache_aware=False, compression_ratio=0.6)
    together, alone, cache, _ = together_and_alone(model, press)
    assert torch.equal(together, alone)
    for row, length in enumerate(LENGTHS):
        n_kept = sum(sum(layer.lengths[row]) for layer in ragged(cache))
        assert n_kept == 2 * len(ragged(cache)) * compute_n_kept(length, 0.6)


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_the_pairs_that_stay_are_those_that_stay_of_the_row_alone(model, budget):
    """None of them is padding, then."""
    press = MoERouterPress(experts=["keydiff", "tova"], budget=budget, cache_aware=False)
    _, _, cache, alone = together_and_alone(model, press)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RaggedLayer):
            for row, heads in enumerate(layer.heads()):
                for (keys, values), (own_keys, own_values) in zip(
                    heads, alone[row].layers[index].heads()[0], strict=True
                ):
                    torch.testing.assert_close(keys, own_keys, atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(values, own_values, atol=1e-4, rtol=1e-4)


def test_own_keep_fractions_are_those_of_the_row_alone(llama):
    together, alone, cache, own = together_and_alone(llama, MoERouterPress(compression_ratio=None, cache_aware=False))
    assert torch.equal(together, alone)
    for layer in cache.layers:
        assert layer.lengths == [[c.layers[0].keys.shape[2] - N_NEW + 1] * 2 for c in own]


def test_beam_search_answers_as_alone(llama):
    press = MoERouterPress(experts=["expected_attention"], budget="layer")
    together, alone, _, _ = together_and_alone(llama, press, num_beams=2)
    assert torch.equal(together, alone)


def test_ratio_zero_answers_as_without_a_press(llama):
    with MoERouterPress(compression_ratio=0)(llama):
        output = generate(llama, *padded_tokens(LENGTHS))
    assert torch.equal(output.sequences, generate(llama, *padded_tokens(LENGTHS)).sequences)


def test_padding_is_not_counted(llama):
    press = MoERouterPress()
    with press(llama):
        generate(llama, *padded_tokens(LENGTHS))
    for layer in press.get_stats()["layer_stats"].values():
        assert layer["router_stats"]["total_tokens"] == sum(LENGTHS)
        assert sum(layer["router_stats"]["expert_usage_count"]) == 2 * sum(LENGTHS)


def test_a_prompt_after_a_padded_one_is_compressed_whole(llama):
    press = MoERouterPress()
    with press(llama):
        generate(llama, *padded_tokens(LENGTHS))
        assert generate(llama, tokens(50)).past_key_values.layers[0].keys.shape[2] == 25 + N_NEW - 1


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        (lambda mask: mask.flip(1), {}, "padding on the right.*padding_side = 'left'"),
        (lambda mask: mask * 0, {}, "a row without text"),
        (lambda mask: mask, {"track_misses": True}, "padded batch.*expected track_misses=False"),
    ],
    ids=["right", "empty", "misses"],
)
def test_what_cannot_be_served_is_refused(model, change, settings, match):
    ids, mask = padded_tokens(LENGTHS)
    mask = change(mask)
    with pytest.raises(UnsupportedInputError, match=match), MoERouterPress(**settings)(model):
        model(ids, attention_mask=mask, position_ids=positions(mask))


def test_a_padded_batch_without_positions_of_its_own_is_refused(llama):
    """The rows' tokens would stand elsewhere than alone, and experts that think of what comes next would err."""
    ids, mask = padded_tokens(LENGTHS)
    for position_ids in (None, torch.arange(100)[None], torch.arange(100).expand(4, -1)):
        with (
            pytest.raises(UnsupportedInputError, match=r"position_ids: .*Call model.generate"),
            MoERouterPress()(llama),
        ):
            llama(ids, attention_mask=mask, position_ids=position_ids)


def test_eager_attention_cannot_read_rows_of_different_lengths():
    model = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(UnsupportedInputError, match=r"padded batch.*not eager.*attn_implementation='sdpa'"):
        together_and_alone(model, MoERouterPress())


class FullCache(DynamicCache):
    """Some cache of the user's."""


@pytest.mark.parametrize("cache", [FullCache(), QuantizedCache.__new__(QuantizedCache)], ids=["own", "quantised"])
def test_caches_that_cannot_turn_ragged_are_refused(llama, cache):
    ids, mask = padded_tokens(LENGTHS)
    cache.layers, cache.layer_class_to_replicate = [], None
    refusal = pytest.raises(
        UnsupportedInputError, match=f"padded batch.*not {type(cache).__name__}. Use a DynamicCache"
    )
    with refusal, MoERouterPress()(llama):
        llama(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)


def test_a_mask_of_four_dimensions_that_hides_tokens_is_refused(llama):
    ids, mask = padded_tokens(LENGTHS)
    causal = torch.ones(100, 100, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    with pytest.raises(UnsupportedInputError, match="padded batch"), MoERouterPress()(llama):
        llama(ids, attention_mask=causal)


def test_questions_padded_to_one_length_are_refused_over_a_compressed_cache(llama):
    cache = prefill(llama, tokens(60, 2), MoERouterPress(0.5, experts=["expected_attention"], budget="global"))
    mask = torch.ones(2, 65, dtype=torch.long)
    questions = {"input_ids": tokens(5, 2), "past_key_values": cache, "position_ids": torch.arange(60, 65)[None]}
    with torch.no_grad():
        llama(**questions, attention_mask=mask)
        cache.crop(60)
        mask[0, 60:62] = 0
        with pytest.raises(UnsupportedInputError, match="questions of equal length"):
            llama(**questions, attention_mask=mask)
