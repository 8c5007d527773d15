"""Which pairs stayed is read off the caches, to the bit, or refused."""

import pytest
import torch
from kvpress import KnormPress, RandomPress
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, UnsupportedInputError
from kvpress_moe.cache import RaggedLayer, kept_pairs
from kvpress_moe.cache.prefill import Prefill
from tests.tiny import kept_positions, prefill, tiny_model, tokens

PROMPT = 80


@pytest.fixture(scope="module")
def full(llama):
    return Prefill(llama, tokens(PROMPT, batch_size=2))


@pytest.mark.parametrize("press", [KnormPress(0.6), RandomPress(0.3), MoERouterPress(0.5, experts=["keydiff"])])
def test_kept_pairs_of_dense_layers_are_where_their_keys_stood(full, press):
    compressed = full.compress(press)  # kvpress's own leave pairs in score order
    kept = kept_pairs(full.cache, compressed)
    for layer_idx, positions in enumerate(kept_positions(full.cache, compressed)):
        expected = torch.zeros(2, 2, PROMPT, dtype=torch.bool).scatter_(-1, positions, True)
        assert torch.equal(kept[layer_idx], expected)


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_kept_pairs_of_ragged_layers_are_their_flat_keys_also_after_more_tokens(llama, full, budget):
    compressed = full.compress(MoERouterPress(0.7, experts=["expected_attention"], budget=budget))
    with torch.no_grad():
        llama(input_ids=tokens(3, batch_size=2, seed=1), past_key_values=compressed)
    for layer_idx, kept in kept_pairs(full.cache, compressed).items():
        assert isinstance(compressed.layers[layer_idx], RaggedLayer)
        assert torch.equal(full.cache.layers[layer_idx].keys[kept], compressed.layers[layer_idx].flat_keys)


def test_a_full_cache_kept_all_and_half_precision_will_do(full):
    assert all(mask.all() for mask in kept_pairs(full.cache, full.cache).values())
    half = DynamicCache([(layer.keys.bfloat16(), layer.values.bfloat16()) for layer in full.cache.layers])
    part = DynamicCache([(layer.keys[:, :, 7:9], layer.values[:, :, 7:9]) for layer in half.layers])
    assert kept_pairs(half, part)[1].nonzero()[:, 2].unique().tolist() == [7, 8]


def test_layers_with_a_sliding_window_are_left_out():
    model = tiny_model("gemma3_text")
    full, compressed = (
        prefill(model, tokens(30), press, DynamicCache(config=model.config)) for press in (None, KnormPress(0.5))
    )
    assert compressed.layers[0].is_sliding
    kept = kept_pairs(full, compressed)
    assert {layer_idx: int(mask.sum()) for layer_idx, mask in kept.items()} == {1: 2 * 15, 2: 2 * 15}


def test_caches_that_do_not_belong_together_are_refused(llama, full):
    other = Prefill(llama, tokens(PROMPT, batch_size=2, seed=1)).cache
    with pytest.raises(UnsupportedInputError, match="^compressed: layer 0, head 0 holds keys that the full cache"):
        kept_pairs(full.cache, other)
    with pytest.raises(UnsupportedInputError, match="^compressed: got 1 layers, expected the full cache's 2"):
        kept_pairs(full.cache, DynamicCache([(full.cache.layers[0].keys, full.cache.layers[0].values)]))
    with pytest.raises(UnsupportedInputError, match="^compressed: layer 0 has 1 rows of 2 heads, expected 2 of 2"):
        kept_pairs(full.cache, Prefill(llama, tokens(PROMPT)).cache)
    ragged = full.compress(MoERouterPress(0.5, experts=["expected_attention"], budget="layer"))
    with pytest.raises(UnsupportedInputError, match="^full: layer 0 is a RaggedLayer"):
        kept_pairs(ragged, ragged)
    twice = DynamicCache([(layer.keys.repeat(1, 1, 2, 1), layer.values) for layer in full.cache.layers])
    with pytest.raises(UnsupportedInputError, match="^full: layer 0, head 0 holds the same key twice"):
        kept_pairs(twice, full.cache)
