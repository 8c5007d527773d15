"""The C library for packed layers: it computes what plain PyTorch computes, and says why if it cannot be built."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from torch.testing import assert_close

import kvpress_moe.cache.compiled_products as compiled_module
import kvpress_moe.cache.packed_attention as packed_attention_module
from kvpress_moe import SettingError, UnsupportedInputError, use_ragged_attention
from kvpress_moe.cache.compiled_products import (
    FEW_QUERIES,
    _tables,
    compiled_packed_attention,
    compiled_packed_attention_together,
    library,
)
from kvpress_moe.cache.packed_attention import packed_attention
from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.precision import MIXED, MIXED_TRANSFORMED, Precision
from kvpress_moe.codes.transform_codes import steps
from kvpress_moe.codes.vector_codes import BITS
from kvpress_moe.model.transformers_api import with_cache
from tests.cache.test_packed_layer import decoded, press_of
from tests.cache.test_packed_triton import made
from tests.tiny import prefill, tiny_model, tokens

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache directory of its own, and a library that is not loaded yet."""
    monkeypatch.setenv("KVPRESS_MOE_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache"
    library.cache_clear()


@compiler
@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(
    ("head_dim", "q_len", "n_tokens", "limit"), [(64, 1, 700, 2**21), (80, 3, 70, 2**21), (40, 10, 600, 300)]
)
def test_the_library_attends_to_what_the_codes_decode_to(
    with_basis, cap, head_dim, q_len, n_tokens, limit, monkeypatch
):
    """Heads of several blocks, of none and of few pairs; also where few heads are computed at once."""
    monkeypatch.setattr(packed_attention_module, "LOGITS_AT_ONCE", limit)
    menu = MIXED_TRANSFORMED if with_basis else MIXED
    query, layer = made(menu, head_dim, q_len + 2, q_len, torch.float32, with_basis, n_tokens)
    with torch.no_grad():
        got = compiled_packed_attention(query, layer, head_dim**-0.5, cap)
        wanted = torch_attention(query, decoded(layer), head_dim**-0.5, cap)
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@compiler
@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits_is_read_by_the_library(bits, with_basis):
    query, layer = made([Precision(bits, bits)], 48, 2, 1, torch.float32, with_basis, 300)
    with torch.no_grad():
        got, wanted = compiled_packed_attention(query, layer, 0.2), torch_attention(query, decoded(layer), 0.2)
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@compiler
def test_the_same_sum_every_time_and_the_arithmetic_of_the_process_is_left_alone():
    query, layer = made(MIXED, 64, 1, 1, torch.float32, False, 5000)
    with torch.no_grad():
        first = compiled_packed_attention(query, layer, 0.1)
        assert all(torch.equal(compiled_packed_attention(query, layer, 0.1), first) for _ in range(5))
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5 > 0).all()  # -ffast-math would round it to 0 from now on


@compiler
def test_many_queries_and_gradients_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(compiled_module, "library", lambda: pytest.fail("the library was called"))
    query, layer = made(MIXED, 64, FEW_QUERIES, FEW_QUERIES, torch.float32, False)
    with torch.no_grad():
        assert torch.equal(compiled_packed_attention(query, layer, 0.1), packed_attention(query, layer, 0.1))
    asking = query[:, :, :1].clone().requires_grad_()
    compiled_packed_attention(asking, layer, 0.1).sum().backward()
    assert asking.grad.isfinite().all()


@compiler
@pytest.mark.parametrize("with_basis", [True, False])
def test_a_model_answers_alike_with_the_library(with_basis, fresh, monkeypatch):
    model = tiny_model("llama", head_dim=64)
    cache = prefill(model, tokens(90, 2), press_of(model, with_basis))
    logits, calls = [], []

    def counted(*args):
        calls.append(args)
        return compiled_packed_attention(*args)

    monkeypatch.setattr(compiled_module, "compiled_packed_attention", counted)
    for attention in ("torch", "compiled"):
        before = use_ragged_attention(attention)
        try:
            with torch.no_grad():
                logits.append(model(tokens(4, 2, seed=1), **with_cache(cache)).logits)
            for layer in cache.layers:
                layer.crop(90)
        finally:
            use_ragged_attention(before)
    assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == len(cache.layers)
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@compiler
def test_the_library_is_built_once(fresh, monkeypatch):
    library()
    library.cache_clear()
    monkeypatch.setattr(compiled_module, "_build", lambda *args: pytest.fail("built again"))
    library()


def test_without_a_compiler_the_error_says_so_and_nothing_changes(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    before = use_ragged_attention("torch")
    with pytest.raises(
        SettingError, match="attention: got 'compiled', expected a C compiler.*No compiler was found.*Or use 'torch'"
    ):
        use_ragged_attention("compiled")
    assert use_ragged_attention(before) is torch_attention


@compiler
def test_what_the_compiler_says_is_in_the_error(fresh, monkeypatch):
    monkeypatch.setattr(compiled_module, "_FLAGS", ("-no-such-flag",))
    with pytest.raises(SettingError, match=r"cc says: .*no-such-flag.*use 'torch'"):
        library()
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(SettingError, match="no/such/compiler"):
        library()
    assert not fresh.exists()


@compiler
def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPRESS_MOE_CACHE", str(tmp_path / "file"))
    library.cache_clear()
    with pytest.raises(SettingError, match=f"{tmp_path / 'file'}"):
        library()
    library.cache_clear()


@compiler
def test_a_failed_build_leaves_no_file(fresh, monkeypatch):
    run = subprocess.run

    def failing(command, **options):
        if "-shared" in command:
            raise subprocess.CalledProcessError(1, command, stderr="broken")
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(SettingError, match="broken"):
        library()
    assert list(fresh.iterdir()) == []


def test_tensors_on_another_device_are_refused():
    query, layer = made(MIXED, 64, 1, 1, torch.float32, False)
    with pytest.raises(UnsupportedInputError, match="got tensors on meta, expected the CPU"):
        compiled_packed_attention(query.to("meta"), layer, 0.1)


def attended(query, layer):
    """What the library computes, which is compared with the decoded pairs first."""
    with torch.no_grad():
        got, wanted = compiled_packed_attention(query, layer, 0.1), torch_attention(query, decoded(layer), 0.1)
    assert_close(got, wanted, atol=2e-4, rtol=2e-3)
    return got


@compiler
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("with_basis", [True, False], ids=["transformed", "rotated"])
def test_tensors_that_were_moved_in_place_are_read_where_they_are_now(which, with_basis):
    """Shared memory does this, tensor by tensor."""
    query, layer = made(MIXED_TRANSFORMED if with_basis else MIXED, 64, 2, 1, torch.float32, with_basis, 300)
    before = attended(query, layer)
    for tier in layer.tiers:
        for tensor in getattr(tier, which).tensors.values():
            old = tensor.detach()
            tensor.data = tensor.clone()
            old.zero_()
            assert torch.equal(attended(query, layer), before)


@compiler
def test_layers_that_share_their_first_tier_alone_are_told_apart():
    (query, layer), (_, other), (_, mixed) = (made(MIXED, 64, 1, 1, torch.float32, False, 300) for _ in range(3))
    for one in (layer, other):
        one._select([1])
    query = query[1:]
    mixed._hold_tiers([layer.tiers[0], *other.tiers[1:]], None, 64, torch.float32, "cpu")
    mixed.update(layer.new_keys, layer.new_values)
    layers = [layer, mixed, layer]
    with torch.no_grad():
        together = compiled_packed_attention_together(query.expand(3, -1, -1, -1), layers, 0.1)
    for row, one in zip(together, layers, strict=True):
        assert_close(row[None], attended(query, one), atol=1e-5, rtol=1e-4)


@compiler
def test_arrays_that_the_library_reads_live_as_long_as_the_codes():
    query, layer = made([Precision(5, 5)], 72, 1, 1, torch.float32, False, 300)
    before = attended(query, layer)
    _tables.cache_clear()  # so does another thread that makes the same tables at the same time
    others = [(ctypes.c_float * length)(*[7.0] * length) for length in (72, 128, 256) for _ in range(500)]
    assert torch.equal(attended(query, layer), before)
    assert others


@compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_of_new_tensors_changes_nothing(dtype, monkeypatch):
    query, layer = made(MIXED, 56, 1, 1, torch.float32, False, 300)
    before = attended(query, layer)
    torch.set_default_dtype(dtype)
    try:
        steps.cache_clear()
        with torch.no_grad():
            assert torch.equal(compiled_packed_attention(query, layer, 0.1), before)
    finally:
        torch.set_default_dtype(torch.float32)


@compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_vectors_in_half_precision_are_left_to_pytorch(dtype):
    query, layer = made(MIXED, 64, 1, 1, dtype, False, 300)
    with torch.no_grad():
        got, wanted = compiled_packed_attention(query, layer, 0.1), packed_attention(query, layer, 0.1)
    assert_close(got, wanted, atol=1e-2, rtol=1e-2)


@compiler
def test_whole_vectors_that_are_not_contiguous_are_left_to_pytorch():
    query, layer = made(MIXED, 64, 1, 1, torch.float32, False, 300)
    before = attended(query, layer)
    whole = layer.tiers[-1].keys
    whole.vectors.data = whole.vectors.T.contiguous().T
    assert not whole.vectors.is_contiguous()
    assert_close(attended(query, layer), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [-1, 1])
def test_positions_outside_of_the_basis_are_refused(shift):
    _, layer = made(MIXED_TRANSFORMED, 64, 1, 1, torch.float32, True, 300)
    keys = torch.zeros(1, 2, 20, 64)
    positions = torch.arange(20) + (shift if shift < 0 else layer.basis.n_positions - 20 + shift)
    with pytest.raises(UnsupportedInputError, match="positions: got"):
        PackedLayer.from_strategies(keys, keys, torch.ones(1, 2, 20), MIXED_TRANSFORMED, layer.basis, positions[None])
