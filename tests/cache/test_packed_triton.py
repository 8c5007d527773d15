"""
The Triton kernel of packed layers, against attention over the decoded pairs, and through a model.

Without a GPU it runs in Triton's interpreter, as in test_triton_backend.py.
"""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

import kvpress_moe.cache.packed_triton_backend as packed_triton_module
from kvpress_moe import UnsupportedInputError, use_ragged_attention
from kvpress_moe.cache import PackedLayer, triton_backend
from kvpress_moe.cache.packed_triton_backend import packed_triton_attention
from kvpress_moe.cache.tiling import PackedTiling
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.bit_layout import bit_layout
from kvpress_moe.codes.bit_packing import PLANES, pack
from kvpress_moe.codes.precision import MIXED, MIXED_TRANSFORMED, Precision
from kvpress_moe.codes.transform_codes import TRANSFORM_BITS, profile
from kvpress_moe.codes.vector_codes import BITS
from kvpress_moe.model.transformers_api import with_cache
from tests.cache.test_packed_layer import decoded, press_of
from tests.cache.test_triton_backend import CLOSE, DEVICE, DTYPES
from tests.codes.test_codes import basis_of, keys_like
from tests.tiny import prefill, tiny_model, tokens


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 pairs, so that heads of a few dozen have several."""
    monkeypatch.setattr(triton_backend, "SMALLEST_TILE", 16)


def made(menu, head_dim, n_new, q_len, dtype, with_basis, n_tokens=70):
    """A layer whose heads keep none, some and all of their pairs, and queries as transformers lays them out."""
    basis = basis_of(n_tokens, head_dim, 2)
    keys = torch.cat([keys_like(basis, n_tokens) for _ in range(2)]).to(dtype)
    strategies = torch.randint(0, len(menu) + 1, keys.shape[:3])
    strategies[0, 0] = 0
    strategies[1, 1] = strategies[1, 1].clamp(min=1)
    values = torch.randn_like(keys)
    layer = PackedLayer.from_strategies(keys, values, strategies, menu, basis if with_basis else None)
    layer._move(DEVICE)
    layer.update(*torch.randn(2, 2, 2, n_new, head_dim, dtype=dtype).to(DEVICE))
    return torch.randn(2, q_len, 6, head_dim, dtype=dtype).to(DEVICE).transpose(1, 2), layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
@pytest.mark.parametrize(("head_dim", "n_new", "q_len", "cap"), [(64, 1, 1, None), (80, 20, 3, 1.5), (40, 7, 7, None)])
def test_the_kernel_attends_to_what_the_codes_decode_to(small_tiles, with_basis, head_dim, n_new, q_len, cap, dtype):
    menu = MIXED_TRANSFORMED if with_basis else MIXED
    query, layer = made(menu, head_dim, n_new, q_len, dtype, with_basis)
    with torch.no_grad():
        got = packed_triton_attention(query, layer, head_dim**-0.5, cap)
        wanted = torch_attention(query.float(), decoded_in_float32(layer), head_dim**-0.5, cap)
    assert got.dtype == dtype
    close = 2 * CLOSE[dtype]  # decoded pairs are rounded too
    assert_close(got.float(), wanted, atol=close, rtol=close)


def decoded_in_float32(layer, dtype=None):
    given = layer.new_keys
    if dtype is not None:  # decode without the rounding of the model's type
        layer.new_keys = given.to(dtype)
    ragged = decoded(layer)
    layer.new_keys = given
    ragged.new_keys = given
    for name in ("flat_keys", "flat_values", "new_keys", "new_values"):
        setattr(ragged, name, getattr(ragged, name).float())
    return ragged


@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits_is_read_by_the_kernel(small_tiles, bits, with_basis):
    query, layer = made([Precision(bits, bits)], 48, 2, 1, torch.float32, with_basis)
    with torch.no_grad():
        got = packed_triton_attention(query, layer, 0.2)
        wanted = torch_attention(query, decoded(layer), 0.2)
    assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def test_a_key_far_out_does_not_overflow_in_half_precision(small_tiles):
    """Its coefficient over the step is more than float16 holds; the decoded key is not."""
    query, layer = made([Precision(6, 4)], 64, 1, 1, torch.float16, True)
    layer.tiers[0].keys.gain[3] = 250  # 1800
    with torch.no_grad():
        got = packed_triton_attention(query * 1e-3, layer, 0.01)
        wanted = torch_attention((query * 1e-3).float(), decoded_in_float32(layer, dtype=torch.float32), 0.01)
    assert_close(got.float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "groups", [((24, bits),) for bits in PLANES] + [profile(80, bits) for bits in TRANSFORM_BITS], ids=str
)
def test_a_layout_finds_every_bit(groups):
    numbers = [torch.randint(0, 2**bits, (channels, 50)) for channels, bits in groups]
    packed = pack(torch.cat(numbers).byte(), groups).int()
    found = 0
    for byte, shift, mask, weight in bit_layout(groups, torch.device("cpu")):
        found = found + ((packed[byte.long()] >> shift[:, None]) & mask[:, None]) * weight[:, None]
    assert torch.equal(found.long(), torch.cat(numbers))


def test_positions_beyond_32_767_and_beyond_65_535_are_read(small_tiles):
    """They are stored in int16, which wraps round, or in int32."""
    for far in (40_000, 70_000):
        basis = basis_of(far, 64, 2)
        keys = keys_like(basis, 30)
        layer = PackedLayer.from_strategies(
            keys, keys, torch.ones(1, 2, 30).long(), [Precision(2, 2)], basis, torch.arange(far - 30, far)[None]
        )
        layer._move(DEVICE)
        layer.update(*torch.randn(2, 1, 2, 1, 64).to(DEVICE))
        query = torch.randn(1, 4, 1, 64).to(DEVICE)
        with torch.no_grad():
            got, wanted = packed_triton_attention(query, layer, 0.1), torch_attention(query, decoded(layer), 0.1)
        assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def test_products_with_means_are_made_for_a_few_queries_at_a_time(small_tiles, monkeypatch):
    query, layer = made(MIXED_TRANSFORMED, 64, 21, 21, torch.float32, True)
    with torch.no_grad():
        at_once = packed_triton_attention(query, layer, 0.1)
        monkeypatch.setattr(packed_triton_module, "MEANS_AT_ONCE", 4 * 70 * 10)
        in_parts = packed_triton_attention(query, layer, 0.1)
    assert_close(in_parts, at_once)


def test_tiles_of_all_tiers_hold_every_pair_once_and_have_places_of_their_own():
    lengths = [[[0, 40], [7, 16]], [[3, 0], [33, 1]]]
    tiling = PackedTiling.of(lengths, 16, torch.device("cpu"))
    for of_tier, tiles in zip(lengths, tiling.tiles, strict=True):
        owner = [head for head, n in enumerate(n for row in of_tier for n in row) for _ in range(n)]
        covered = [(pair, head) for head, start, end, _ in tiles.tolist() for pair in range(start, end)]
        assert covered == list(enumerate(owner))
    placed = sorted((place, head) for tiles in tiling.tiles for head, _, _, place in tiles.tolist())
    assert [place for place, _ in placed] == list(range(len(placed)))
    first = tiling.first_tiles.tolist()
    assert all(first[head] <= place < first[head + 1] for place, head in placed)


@pytest.mark.parametrize("with_basis", [True, False])
def test_a_model_answers_alike_through_the_kernel(small_tiles, with_basis, monkeypatch):
    model = tiny_model("llama", head_dim=64).to(DEVICE)
    press = press_of(model, with_basis, experts=["learned", "keydiff", "cur"])
    cache = prefill(model, tokens(90, 2).to(DEVICE), press)
    logits, calls = [], []

    def counted(*args):
        calls.append(args)
        return packed_triton_attention(*args)

    monkeypatch.setattr("kvpress_moe.cache.packed_triton_backend.packed_triton_attention", counted)
    for attention in ("torch", "triton"):
        before = use_ragged_attention(attention)
        try:
            with torch.no_grad():
                question = tokens(4, 2, seed=1).to(DEVICE)
                logits.append(model(question, **with_cache(cache)).logits)
            for layer in cache.layers:
                layer.crop(90)
        finally:
            use_ragged_attention(before)
    assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == len(cache.layers)


def test_what_the_kernel_cannot_serve_is_refused():
    query, layer = made(MIXED, 64, 1, 1, torch.float32, False)
    with pytest.raises(UnsupportedInputError, match="got a query of torch.float16 on .*, pairs of torch.float32"):
        packed_triton_attention(query.half(), layer, 0.1)
    with pytest.raises(UnsupportedInputError, match="require a gradient"):
        packed_triton_attention(query.requires_grad_(), layer, 0.1)
