"""Several caches that are read together give what each gives alone, and grow as they do alone."""

import copy
import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress, use_ragged_attention
from kvpress_moe.cache import PackedLayer, read_together
from kvpress_moe.cache.compiled_products import COMPILED, compiled_packed_attention_together
from kvpress_moe.cache.joined_cache import JoinedCache, rotary_changes
from kvpress_moe.cache.packed_attention import (
    TORCH,
    can_attend_together,
    of_similar_length,
    packed_attention_together,
)
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.precision import MIXED, MIXED_TRANSFORMED
from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache
from tests.cache.test_packed_layer import decoded
from tests.codes.test_codes import basis_of
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


compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def alone(model, cache, input_ids, start):
    """The naive loop: one cache, one token after the other."""
    for position, token in enumerate(input_ids, start=start):
        at = torch.tensor([position])
        with torch.no_grad():
            output = model(torch.tensor([[token]]), position_ids=at[None], **with_cache(cache, at))
    return output.logits[0, -1]


@pytest.fixture(params=["torch", pytest.param("compiled", marks=compiler)])
def attention(request):
    before = use_ragged_attention(request.param)
    yield
    use_ragged_attention(before)


@pytest.mark.parametrize("family", ["llama", "qwen3_sliding", "gemma3_text", "mixtral"])
def test_caches_that_are_read_together_give_what_each_gives_alone(family, attention):
    model = tiny_model(family)
    kinds, lengths = [*KINDS, KINDS[-1], KINDS[-1]], [60, 41, 50, 33, 70, 24]
    new = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15], [16], [17, 18]]
    caches = [made(model, settings, n, seed) for seed, (settings, n) in enumerate(zip(kinds, lengths, strict=True))]
    copies = copy.deepcopy(caches)
    caches, copies, lengths, new = [*caches, DynamicCache()], [*copies, DynamicCache()], [*lengths, 0], [*new, [4] * 21]
    for _ in range(3):
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


def packed(basis, n_tokens, n_new, seed):
    """A layer of one row whose heads keep none, some and all of their pairs."""
    torch.manual_seed(seed)
    menu = MIXED if basis is None else MIXED_TRANSFORMED
    keys = torch.randn(1, 3, n_tokens, 16)
    strategies = torch.randint(0, len(menu) + 1, keys.shape[:3])
    strategies[0, 0], strategies[0, 2] = 0, strategies[0, 2].clamp(min=1)
    own = None if basis is None else KeyBasis(basis.transform, basis.rotary, n_tokens)
    layer = PackedLayer.from_strategies(keys, torch.randn_like(keys), strategies, menu, own)
    layer.update(*torch.randn(2, 1, 3, n_new, 16))
    return layer


@pytest.mark.parametrize("products", ["torch", pytest.param("compiled", marks=compiler)])
@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_packed_layers_that_attend_together_give_what_each_gives_alone(products, with_basis, cap):
    basis = basis_of(300, 16, 3) if with_basis else None
    layers = [packed(basis, n, n_new, seed) for seed, (n, n_new) in enumerate([(70, 1), (300, 5), (9, 2), (41, 1)])]
    queries = torch.randn(4, 6, 1, 16)
    assert can_attend_together(layers)
    with torch.no_grad():
        own = TORCH if products == "torch" else COMPILED
        together = packed_attention_together(queries, layers, 0.3, cap, own)
        alone = [
            torch_attention(q, decoded(layer), 0.3, cap) for q, layer in zip(queries.split(1), layers, strict=True)
        ]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_layers_of_one_group_have_few_logits_together(monkeypatch):
    monkeypatch.setattr("kvpress_moe.cache.packed_attention.LOGITS_AT_ONCE", 1000)
    layers = {f"{n}": packed(None, n, 1, seed) for seed, n in enumerate([9, 300, 70, 41])}
    longest = {name: layer.table.longest for name, layer in layers.items()}
    groups = of_similar_length(layers, 6)
    assert sorted(name for group in groups for name in group) == sorted(layers)
    assert all(len(group) == 1 or 6 * len(group) * max(longest[n] for n in group) <= 1000 for group in groups)
    assert groups == [["300"], ["70", "41"], ["9"]]


@pytest.mark.parametrize("parameters", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_texts_are_not_read_together_where_one_would_change_the_positions_of_another(llama, parameters):
    model = copy.deepcopy(llama)
    assert not rotary_changes(model)
    model.config.rope_parameters = parameters
    assert rotary_changes(model)
    with pytest.raises(UnsupportedInputError, match="one by one"):
        read_together(model, [DynamicCache(), DynamicCache()], [[1], [2]], [0, 0])
    assert read_together(model, [DynamicCache()], [[1, 2]], [0]).shape == (1, model.config.vocab_size)


@compiler
def test_the_library_refuses_tensors_that_are_not_on_the_cpu():
    layer = packed(None, 9, 1, 0)
    with pytest.raises(UnsupportedInputError, match="expected the CPU"):
        compiled_packed_attention_together(torch.empty(1, 6, 1, 16, device="meta"), [layer], 0.3)


def test_layers_of_other_routers_do_not_attend_together():
    layers = [packed(basis_of(70, 16, 3), 70, 1, seed) for seed in (1, 2)]
    assert not can_attend_together(layers)


def test_positions_are_those_that_the_caches_know(llama):
    """Also after an eviction, when fewer pairs are there than were read."""
    caches = [made(llama, settings, 40 + n, n) for n, settings in enumerate(KINDS)]
    new, starts = [[5, 6], [7], [8], [9, 10]], [40, 41, 42, 43]
    given = read_together(llama, copy.deepcopy(caches), new, starts)
    assert torch.equal(read_together(llama, caches, new), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_together_as_alone(dtype, attention):
    model = tiny_model("llama", dtype=dtype)
    caches = [made(model, settings, 50, seed) for seed, settings in enumerate([*KINDS, KINDS[-1]])]
    copies, new = copy.deepcopy(caches), [[5], [6, 7], [8], [9], [10]]
    together = read_together(model, caches, new)
    each = torch.stack([alone(model, *row, 50) for row in zip(copies, new, strict=True)]).float()
    assert_close(together, each, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("settings", KINDS)
def test_a_cache_of_several_rows_is_refused(llama, settings):
    press = None if settings is None else MoERouterPress(0.5, experts=["expected_attention"], **settings)
    cache = prefill(llama, tokens(30, batch_size=2), press)
    with pytest.raises(UnsupportedInputError, match="got a cache of 2 rows"):
        read_together(llama, [DynamicCache(), cache], [[1], [2]])
