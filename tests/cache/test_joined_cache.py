"""Several caches that are read together give what each gives alone, and grow as they do alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache import JoinedCache, read_together
from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache
from tests.tiny import prefill, tiny_model, tokens

KINDS = [
    None,  # dense
    {"budget": "uniform"},  # shortened
    {"budget": "global"},  # ragged
    {"budget": "global", "precision": "mixed"},  # packed
]


def made(model, settings, length, seed):
    press = None if settings is None else MoERouterPress(0.5, experts=["expected_attention"], **settings)
    return prefill(model, tokens(length, seed=seed), press)


def alone(model, cache, input_ids, start):
    """The naive loop: one cache, one token after the other."""
    for position, token in enumerate(input_ids, start=start):
        at = torch.tensor([position])
        with torch.no_grad():
            output = model(torch.tensor([[token]]), position_ids=at[None], **with_cache(cache, at))
    return output.logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3_sliding", "gemma3_text", "mixtral"])
def test_caches_that_are_read_together_give_what_each_gives_alone(family):
    model = tiny_model(family)
    lengths, new = [60, 41, 50, 33], [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15]]
    caches = [made(model, settings, n, seed) for seed, (settings, n) in enumerate(zip(KINDS, lengths, strict=True))]
    copies = copy.deepcopy(caches)
    caches, copies, lengths, new = [*caches, DynamicCache()], [*copies, DynamicCache()], [*lengths, 0], [*new, [4] * 21]
    for _ in range(2):
        together = read_together(model, caches, new, lengths)
        each = [alone(model, *row) for row in zip(copies, new, lengths, strict=True)]
        assert torch.allclose(together, torch.stack(each), atol=2e-5), (together - torch.stack(each)).abs().amax(1)
        lengths = [n + len(ids) for n, ids in zip(lengths, new, strict=True)]
        new = [[int(row.argmax())] for row in each]
    assert [cache.get_seq_length() for cache in caches] == lengths
    for cache, other in zip(caches, copies, strict=True):
        last = [one.layers[-1] for one in (cache, other)]
        pairs = [getattr(layer, "new_keys", layer.keys) for layer in last]
        assert torch.allclose(*pairs, atol=1e-5)


def test_a_text_that_is_read_in_pieces_beside_others_is_read_as_in_one_piece(llama):
    whole = tokens(60)[0].tolist()
    expected = alone(llama, DynamicCache(), whole, 0)
    cache, other = DynamicCache(), made(llama, KINDS[2], 30, 1)
    for start, stop in ((0, 25), (25, 59), (59, 60)):
        found = read_together(llama, [cache, other], [whole[start:stop], [3]], [start, 30 + start])
    assert torch.allclose(found[0], expected, atol=2e-5)


def test_attention_that_cannot_read_together_is_refused(llama):
    eager = copy.deepcopy(llama)
    eager.set_attn_implementation("eager")
    with pytest.raises(UnsupportedInputError, match="set_attn_implementation"):
        read_together(eager, [DynamicCache()], [[1, 2]], [0])
    with pytest.raises(UnsupportedInputError, match="lengths: got"):
        JoinedCache([DynamicCache()], [0])
    with pytest.raises(UnsupportedInputError, match="input_ids: got"), torch.no_grad():
        llama(torch.tensor([[1, 2]]), **with_cache(JoinedCache([DynamicCache()], [1])))
