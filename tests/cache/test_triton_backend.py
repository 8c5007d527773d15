"""
The kernels of ragged attention, and what else may compute it: against a naive loop, and through a model.

Without a GPU the kernels run in Triton's interpreter, which tests/conftest.py asks for; with one they are compiled, and
bfloat16 is tested too, which the interpreter lacks.
"""

# ruff: noqa: E402

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

triton = pytest.importorskip("triton")

from experiments import ragged_candidates
from kvpress_moe import MoERouterPress, SettingError, UnsupportedInputError, use_ragged_attention
from kvpress_moe.cache import RaggedLayer, triton_backend
from kvpress_moe.cache.tiling import Tiling
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.cache.triton_backend import tile_size_for, triton_attention
from tests.tiny import prefill, tiny_model, tokens

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
N_BATCH, N_HEADS, GROUP, N_PROMPT = 2, 3, 2, 70


def made(n_new, head_dim=8, q_len=1, dtype=torch.float32):
    """A layer of heads that keep none, a few, and all of their pairs; and queries as transformers lays them out."""
    shape = (N_BATCH, N_HEADS, N_PROMPT, head_dim)
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    kept = torch.rand(N_BATCH, N_HEADS, N_PROMPT) < torch.tensor([[0.0, 0.1, 1.0], [0.5, 0.9, 0.02]])[..., None]
    layer = RaggedLayer.from_dense(keys.to(DEVICE), values.to(DEVICE), kept.to(DEVICE))
    new = torch.randn(2, N_BATCH, N_HEADS, n_new, head_dim, dtype=dtype).to(DEVICE)
    layer.update(*new)
    query = torch.randn(N_BATCH, q_len, N_HEADS * GROUP, head_dim, dtype=dtype).to(DEVICE).transpose(1, 2)
    return query, layer


def naive(query, layer, scaling, cap=None):
    """One query at a time, one head at a time, in float32."""
    n_batch, num_heads, q_len, _ = query.shape
    n_new = layer.new_keys.shape[2]
    output = torch.zeros(n_batch, q_len, num_heads, query.shape[3], device=query.device)
    for row in range(n_batch):
        for head in range(num_heads):
            kept_keys, kept_values = layer.heads()[row][head // GROUP]
            for asking in range(q_len):
                seen = n_new - q_len + asking + 1
                keys = torch.cat((kept_keys, layer.new_keys[row, head // GROUP, :seen])).float()
                values = torch.cat((kept_values, layer.new_values[row, head // GROUP, :seen])).float()
                logits = keys @ query[row, head, asking].float() * scaling
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                output[row, asking, head] = logits.softmax(0) @ values
    return output


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 pairs, so that heads of a few dozen have several."""
    monkeypatch.setattr(triton_backend, "SMALLEST_TILE", 16)


@pytest.fixture
def with_triton():
    before = use_ragged_attention("triton")
    yield
    use_ragged_attention(before)


# ── the kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "n_new", "q_len", "cap"),
    [(8, 1, 1, None), (24, 1, 1, 1.5), (24, 40, 1, None), (8, 40, 3, 1.5), (24, 5, 5, None), (8, 21, 21, None)],
)
def test_kernels_compute_what_a_naive_loop_computes(small_tiles, head_dim, n_new, q_len, cap, dtype):
    query, layer = made(n_new, head_dim, q_len, dtype)
    scaling = head_dim**-0.5
    got = triton_attention(query, layer, scaling, cap)
    assert got.dtype == dtype
    assert_close(got.float(), naive(query, layer, scaling, cap), atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_one_tile_of_a_head_or_many_give_the_same(monkeypatch):
    query, layer = made(40, q_len=3)
    outputs = []
    for smallest in (16, 32, 128):
        monkeypatch.setattr(triton_backend, "SMALLEST_TILE", smallest)
        outputs.append(triton_attention(query, layer, 0.3))
    assert_close(outputs[0], outputs[1])
    assert_close(outputs[0], outputs[2])


def test_a_head_of_many_tiles_is_put_together_from_all_of_them(small_tiles):
    """More than the merging kernel takes at once; the pairs that matter most come last."""
    keys, values = torch.randn(2, 1, 1, 400, 8).sort(dim=-2).values.to(DEVICE)
    layer = RaggedLayer.from_dense(keys, values, torch.ones(1, 1, 400, dtype=torch.bool, device=DEVICE))
    layer.update(*torch.randn(2, 1, 1, 1, 8).to(DEVICE))
    query = torch.ones(1, GROUP, 1, 8).to(DEVICE)
    assert len(layer.tiling(16).tiles) == 25
    assert_close(triton_attention(query, layer, 0.3), naive(query, layer, 0.3), atol=1e-5, rtol=1e-5)


def test_a_question_longer_than_what_is_kept_has_tiles_as_long_as_itself(monkeypatch):
    """Otherwise its float32 parts, one for each tile and query, would outgrow everything else."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", 1)
    monkeypatch.setattr(triton_backend, "SMALLEST_TILE", 16)
    query, layer = made(130)
    sizes, tiling = [], layer.tiling
    monkeypatch.setattr(layer, "tiling", lambda size: sizes.append(size) or tiling(size))
    triton_attention(query, layer, 0.3)
    assert sizes == [256]


def test_logits_far_from_zero_neither_overflow_nor_vanish(small_tiles):
    query, layer = made(40, q_len=3)
    for scaling in (300.0, -300.0):  # logits of thousands, whose float32 is exact to some 1e-4
        assert_close(triton_attention(query, layer, scaling), naive(query, layer, scaling), atol=1e-2, rtol=1e-2)


def test_tokens_that_were_taken_back_are_not_seen(small_tiles):
    """What is left after a crop is a view, whose heads lie apart."""
    query, layer = made(40)
    layer.crop(N_PROMPT + 7)
    layer.new_values = layer.new_values.contiguous()  # keys and values lie differently
    assert not layer.new_keys.is_contiguous()
    assert_close(triton_attention(query, layer, 0.3), naive(query, layer, 0.3), atol=1e-5, rtol=1e-5)


def test_queries_may_lie_in_memory_in_any_order(small_tiles):
    query, layer = made(5, q_len=5)
    turned = query.mT.contiguous().mT
    assert turned.stride(-1) != 1
    assert_close(triton_attention(turned, layer, 0.3), triton_attention(query, layer, 0.3))


def test_rows_in_another_order_have_tiles_of_their_own(small_tiles):
    query, layer = made(5)
    triton_attention(query, layer, 0.3)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert_close(triton_attention(query, layer, 0.3), naive(query, layer, 0.3), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=2), min_size=1, max_size=4), st.integers(1, 200))
def test_tiles_hold_every_pair_once_and_belong_to_its_head(lengths, tile_size):
    tiling = Tiling.of(lengths, tile_size, torch.device("cpu"))
    flat = [length for heads in lengths for length in heads]
    owner = [head for head, length in enumerate(flat) for _ in range(length)]
    covered = [(pair, head) for head, start, end in tiling.tiles.tolist() for pair in range(start, end)]
    assert covered == list(enumerate(owner))
    assert all(0 < end - start <= tile_size for _, start, end in tiling.tiles.tolist())
    first = tiling.first_tiles.tolist()
    for head in range(len(flat)):
        assert all(tile[0] == head for tile in tiling.tiles[first[head] : first[head + 1]].tolist())
    assert first[-1] == len(tiling.tiles)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2**16), min_size=1, max_size=32),
    st.integers(1, 2**14),
    st.integers(1, 300),
)
def test_a_long_question_has_few_tiles(lengths, n_new, row_blocks):
    """Parts in memory grow with programs; these are bounded by what was aimed for, and two for each head and block."""
    size = tile_size_for(sum(lengths) + len(lengths) * n_new, max(n_new, *lengths), row_blocks)
    n_tiles = sum(-(-length // size) for length in lengths) + len(lengths) * -(-n_new // size)
    assert n_tiles * row_blocks <= triton_backend.PROGRAMS + 2 * len(lengths) * row_blocks
    assert size & (size - 1) == 0


# ── through a model ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_model_writes_the_same_through_the_kernels(small_tiles, family):
    model = tiny_model(family).to(DEVICE)
    press = MoERouterPress(0.5, experts=["expected_attention"], budget="global")
    answers, logits = [], []
    for attention in ("torch", "triton"):
        before = use_ragged_attention(attention)
        try:
            with press(model):
                answers.append(model.generate(tokens(90, 2).to(DEVICE), max_new_tokens=5, do_sample=False))
            cache = prefill(model, tokens(90, 2).to(DEVICE), press)
            with torch.no_grad():
                logits.append(model(tokens(4, 2, seed=1).to(DEVICE), past_key_values=cache).logits)
        finally:
            use_ragged_attention(before)
    assert torch.equal(*answers)
    assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_function_of_ones_own_is_what_models_call(llama):
    seen = []

    def own(query, layer, scaling, cap):
        seen.append(query.shape)
        return torch_attention(query, layer, scaling, cap)

    before = use_ragged_attention(own)
    try:
        with MoERouterPress(0.5, experts=["expected_attention"], budget="layer")(llama):
            llama.generate(tokens(40), max_new_tokens=3, do_sample=False)
    finally:
        assert use_ragged_attention(before) is own
    assert seen == [torch.Size([1, 4, 1, 8])] * 2 * 2  # two layers, two tokens after the prefill's


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", ["flash", "Triton", None, 3])
def test_an_unknown_attention_is_refused_and_nothing_changes(wrong):
    before = use_ragged_attention("torch")
    with pytest.raises(SettingError, match="attention: got .*expected 'torch', 'compiled', 'triton' or a function"):
        use_ragged_attention(wrong)
    assert use_ragged_attention(before) is torch_attention


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "kvpress_moe.cache.triton_backend")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SettingError, match=r"attention: got 'triton'.*pip install"):
        use_ragged_attention("triton")


def test_double_precision_is_refused(with_triton):
    query, layer = made(1, dtype=torch.float64)
    with pytest.raises(UnsupportedInputError, match=r"got torch.float64.*use_ragged_attention\('torch'\)"):
        triton_attention(query, layer, 1.0)


@pytest.mark.parametrize("what", ["query", "new_keys", "new_values", "flat_keys"])
def test_gradients_are_refused(what):
    query, layer = made(1)
    (query if what == "query" else getattr(layer, what)).requires_grad_()
    with pytest.raises(UnsupportedInputError, match="got queries, keys or values that require a gradient"):
        triton_attention(query, layer, 1.0)
    with torch.no_grad():
        triton_attention(query, layer, 1.0)


def test_a_query_of_another_dtype_than_the_cache_is_refused():
    query, layer = made(1)
    with pytest.raises(UnsupportedInputError, match=r"got a query of torch.float16 on .*, pairs of torch.float32"):
        triton_attention(query.half(), layer, 1.0)


def test_heads_too_large_for_a_block_are_refused():
    query, layer = made(1, head_dim=264)
    with pytest.raises(UnsupportedInputError, match="got heads of 264 dimensions, expected at most 256"):
        triton_attention(query, layer, 1.0)


@pytest.mark.skipif(ON_GPU, reason="compiled, they compute it")
def test_the_interpreter_is_not_given_bfloat16_of_which_it_makes_nonsense():
    query, layer = made(1, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedInputError, match="got torch.bfloat16, expected one of torch.float16, torch.float32"):
        triton_attention(query, layer, 1.0)


@pytest.mark.skipif(ON_GPU, reason="its tensors would be where the kernels run")
def test_without_a_gpu_or_the_interpreter_the_error_says_so(monkeypatch):
    query, layer = made(1)
    monkeypatch.setattr(triton_backend, "attend_tiles", object())  # as compiled kernels are no interpreted functions
    with pytest.raises(UnsupportedInputError, match=r"got tensors on cpu, expected a CUDA device. Call use_ragged"):
        triton_attention(query, layer, 1.0)


# ── compiled, and beside others ──────────────────────────────────────────────────────────────────────────────────────


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For H100 and A100: within their shared memory, nothing spilled, bfloat16 on tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.compiled_kernels", "--capabilities", "80", "90"]
    command += ["--dtypes", "bf16", "fp32", "--head-dims", "128", "--kernels", "ragged"]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[4:]]
    assert len(rows) == 2 * 2 * 5
    for capability, dtype, _, kernel, _, spilled, _, wide_copies, products in rows:
        assert spilled == "0", (capability, dtype, kernel)
        if "merge" not in kernel:
            assert int(wide_copies) > 0
            assert (int(products) > 0) == (dtype == "bf16")


def flash_on_a_cpu(query, key, value, queries_at, keys_at, most_queries, most_keys, *, scale, return_aux):
    """What torch's documentation says of its call for sequences of different lengths."""
    outputs, logs = [], []
    for n in range(len(queries_at) - 1):
        asking, asked = slice(*queries_at[n : n + 2]), slice(*keys_at[n : n + 2])
        assert asking.stop - asking.start <= most_queries
        assert asked.stop - asked.start <= most_keys
        logits = torch.einsum("qhd,khd->hqk", query[asking], key[asked]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[asked]))
        total = logits.logsumexp(-1)
        logs.append(torch.where(total == -torch.inf, torch.inf, total))  # as flash-attn reports an empty sequence
    return torch.cat(outputs), torch.cat(logs, dim=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("n_new", "q_len"), [(1, 1), (5, 5), (20, 3)])
def test_candidates_of_the_benchmark_compute_the_same(monkeypatch, n_new, q_len):
    query, layer = made(n_new, q_len=q_len)
    expected = naive(query, layer, 0.3)
    assert_close(ragged_candidates.flex_attention(query, layer, 0.3), expected, atol=1e-5, rtol=1e-5)
    capped = naive(query, layer, 0.3, 1.5)
    assert_close(ragged_candidates.flex_attention(query, layer, 0.3, 1.5), capped, atol=1e-5, rtol=1e-5)
    if not ON_GPU:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_on_a_cpu)
        assert_close(ragged_candidates.flash_attention(query, layer, 0.3), expected, atol=1e-5, rtol=1e-5)
