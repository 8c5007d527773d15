"""PackedLayer: attention over codes equals attention over what they decode to, in every use of a cache."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import kvpress_moe.cache.packed_attention as packed_attention_module
from kvpress_moe import MoERouterPress
from kvpress_moe.cache import PackedLayer, RaggedCache, load_cache, save_cache
from kvpress_moe.cache.packed_attention import packed_attention
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.precision import MIXED, MIXED_TRANSFORMED
from kvpress_moe.errors import CheckpointError, UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache
from tests.codes.test_codes import basis_of, keys_like
from tests.tiny import FAMILIES, calibrated_routers, greedy, prefill, tiny_model, tokens

D = 64


def layer_of(n_batch=2, n_heads=2, n_tokens=130, with_basis=True, seed=0) -> PackedLayer:
    torch.manual_seed(seed)
    basis = basis_of(n_tokens, D, n_heads) if with_basis else None
    keys = torch.cat([keys_like(basis or basis_of(n_tokens, D, n_heads), n_tokens) for _ in range(n_batch)])
    menu = MIXED_TRANSFORMED if with_basis else MIXED
    strategies = torch.randint(0, len(menu) + 1, keys.shape[:3])
    strategies[0, 0, 5:] = 0  # a head of few pairs
    layer = PackedLayer.from_strategies(keys, torch.randn_like(keys), strategies, menu, basis)
    assert layer.lengths == (strategies > 0).sum(-1).tolist()
    return layer


def decoded(layer: PackedLayer) -> RaggedLayer:
    """The same pairs in a ragged layer."""
    heads = [pair for row in layer.heads() for pair in row]
    ragged = RaggedLayer(
        torch.cat([k for k, _ in heads]), torch.cat([v for _, v in heads]), layer.lengths, layer.n_read
    )
    ragged.new_keys, ragged.new_values = layer.new_keys, layer.new_values
    return ragged


@pytest.mark.parametrize("with_basis", [True, False])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("q_len", "limits"), [(1, (4096, 2**21)), (7, (50, 300)), (7, (4096, 1))])
def test_attention_over_codes_is_attention_over_what_they_decode_to(with_basis, cap, q_len, limits, monkeypatch):
    """Also where blocks and logits are cut into many parts."""
    for name, limit in zip(("BLOCK", "LOGITS_AT_ONCE"), limits, strict=True):
        monkeypatch.setattr(packed_attention_module, name, limit)
    layer = layer_of(with_basis=with_basis)
    layer.update(*torch.randn(2, 2, 2, 3 + q_len, D))
    query = torch.randn(2, 6, q_len, D)
    with torch.no_grad():
        ours = packed_attention(query, layer, 0.125, cap)
        theirs = torch_attention(query, decoded(layer), 0.125, cap)
    assert (ours - theirs).abs().max() < 1e-4


def test_a_gradient_reaches_the_queries():
    layer = layer_of()
    layer.update(*torch.randn(2, 2, 2, 1, D))
    query = torch.randn(2, 4, 1, D, requires_grad=True)
    packed_attention(query, layer, 0.125).square().sum().backward()
    other = query.detach().clone().requires_grad_()
    torch_attention(other, decoded(layer), 0.125).square().sum().backward()
    assert torch.allclose(query.grad, other.grad, atol=1e-4)


def test_no_dense_copy_of_a_layer_is_made(monkeypatch):
    """Every tensor that attention over 20,000 pairs makes is smaller than half of a head's dense keys."""
    layer = layer_of(1, 2, 20_000)
    layer.update(*torch.randn(2, 1, 2, 1, D))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if isinstance(tensor, torch.Tensor) and tensor._base is None:
                    largest = max(largest, tensor.nbytes)
            return made

    packed_attention(torch.randn(1, 4, 1, D), layer, 0.125)  # the table of positions is remembered
    with torch.no_grad(), Watch():
        packed_attention(torch.randn(1, 4, 1, D), layer, 0.125)
    assert largest <= 20_000 * D * 4 / 2


def test_bytes_are_those_of_the_tensors_and_of_the_tables():
    layer = layer_of()
    tables = 4 * 2 * 2 * len(layer.tiers)
    assert layer.nbytes == sum(tensor.nbytes for tensor in layer.tensors) + tables
    assert layer.nbytes < decoded(layer).nbytes / 3


def test_rows_are_selected_repeated_moved_and_copied():
    layer = layer_of()
    layer.update(*torch.randn(2, 2, 2, 3, D))
    query = torch.randn(2, 4, 1, D)
    before = packed_attention(query, layer, 0.125)
    swapped = copy.deepcopy(layer)
    swapped.reorder_cache(torch.tensor([1, 0, 1]))
    after = packed_attention(query[[1, 0, 1]], swapped, 0.125)
    assert torch.allclose(after, before[[1, 0, 1]], atol=1e-6)
    for change in (
        lambda it: it.offload(),
        lambda it: it.prefetch(),
        lambda it: it.batch_select_indices(torch.tensor([0, 1])),
    ):
        change(layer)
        assert torch.equal(packed_attention(query, layer, 0.125), before)
    layer.batch_repeat_interleave(2)
    assert torch.allclose(
        packed_attention(query.repeat_interleave(2, 0), layer, 0.125), before.repeat_interleave(2, 0), atol=1e-5
    )
    layer.crop(layer.n_read + 1)
    assert layer.get_seq_length() == 131
    with pytest.raises(UnsupportedInputError):
        layer.crop(5)


def test_a_layer_of_codes_is_not_taken_for_one_of_pairs():
    with pytest.raises(UnsupportedInputError, match="PackedLayer, whose pairs are codes"):
        _ = layer_of().flat_keys


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2)


def routed(model, with_basis: bool):
    routers = calibrated_routers(model)
    if with_basis:
        config = model.config.get_text_config()
        routers.key_transforms = {
            layer_idx: basis_of(1, model.model.layers[0].self_attn.head_dim, config.num_key_value_heads).transform
            for layer_idx in range(config.num_hidden_layers)
        }
    return routers


def press_of(model, with_basis=False, ratio=0.8, **settings) -> MoERouterPress:
    settings = {"precision": "mixed", "router": routed(model, with_basis), **settings}
    return MoERouterPress(ratio, **settings)


def pair_bytes(cache) -> int:
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, PackedLayer))


@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("budget", ["global", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.93])
def test_the_byte_budget_is_exact(llama, with_basis, budget, ratio):
    input_ids = tokens(200, 2)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefill(llama, input_ids).layers)
    cache = prefill(llama, input_ids, press_of(llama, with_basis, ratio, budget=budget))
    taken, allowed = pair_bytes(cache), full * (1 - ratio)
    n_groups = {"global": 2, "layer": 2 * 2, "uniform": 2 * 2 * 2}[budget]
    unused = sum(7 - len(layer.tiers) for layer in cache.layers) * 2 * 2 * 4  # tables of precisions that no pair has
    assert taken <= allowed
    assert allowed - taken - unused <= n_groups * (2 * 16 * 4 + 8)


@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("family", [f for f in ("llama", "gemma3_text", "gemma2", "phi3", "qwen3") if f in FAMILIES])
def test_answers_are_those_of_the_decoded_pairs(family, with_basis):
    model = tiny_model(family) if family in ("gemma2", "phi3") else tiny_model(family, head_dim=16)
    input_ids = tokens(120)
    cache = prefill(model, input_ids, press_of(model, with_basis, budget="global"))
    dense = RaggedCache()
    dense.layers = [decoded(layer) if isinstance(layer, PackedLayer) else copy.copy(layer) for layer in cache.layers]
    question = tokens(3, seed=9)
    assert torch.equal(greedy(model, question, copy.deepcopy(cache), 120, 12), greedy(model, question, dense, 120, 12))


def test_rows_of_a_padded_batch_are_compressed_as_if_alone(llama):
    from tests.tiny import padded_tokens

    input_ids, mask = padded_tokens([90, 60])
    settings = {"router": routed(llama, True), "budget": "global", "cache_aware": False}
    cache, press = DynamicCache(), press_of(llama, **settings)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), press(llama):
        llama.model(input_ids, attention_mask=mask, position_ids=positions, **with_cache(cache))
    for row, n_text in enumerate((90, 60)):
        alone = prefill(llama, input_ids[row : row + 1, -n_text:], press_of(llama, **settings))
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            assert ours.lengths[row] == theirs.lengths[0]
            for (key, value), (other_key, other_value) in zip(ours.heads()[row], theirs.heads()[0], strict=True):
                assert torch.allclose(key, other_key, atol=2e-2)
                assert torch.allclose(value, other_value, atol=2e-2)


@pytest.mark.parametrize("with_basis", [False, True])
def test_a_saved_cache_answers_as_the_live_one_and_takes_its_bytes(tmp_path, llama, with_basis):
    input_ids, routers = tokens(900), routed(llama, with_basis)
    press = press_of(llama, ratio=0.7, router=routers)
    cache = prefill(llama, input_ids, press)
    path = save_cache(tmp_path / "book.kv", cache, llama, input_ids, press)
    if with_basis:
        with pytest.raises(CheckpointError, match="key transforms that the package does not hold"):
            load_cache(path, llama)
        from kvpress_moe.routers.checkpoint import save_routers

        save_routers(routers, tmp_path / "routers")
    loaded = load_cache(path, llama, tmp_path / "routers" if with_basis else None)
    assert pair_bytes(loaded.cache) == pair_bytes(cache)
    assert path.stat().st_size < pair_bytes(cache) + 20_000
    question = tokens(4, seed=5)
    assert torch.equal(greedy(llama, question, loaded.cache, 900, 10), greedy(llama, question, cache, 900, 10))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_inside_the_block_and_with_the_cache_after_it_agree(llama, how):
    routers, input_ids = routed(llama, True), tokens(100)
    with press_of(llama, router=routers, budget="global")(llama):
        inside = llama.generate(input_ids, max_new_tokens=6, do_sample=False, **how)
    if how:
        assert inside.shape == (1, 106)
        return
    cache = prefill(llama, input_ids[:, :-1], press_of(llama, router=routers, budget="global"))
    question = torch.cat((input_ids, tokens(3, seed=4)), 1)
    first = llama.generate(question, past_key_values=copy.deepcopy(cache), max_new_tokens=6, do_sample=False)
    cache.crop(99)
    assert torch.equal(first, llama.generate(question, past_key_values=cache, max_new_tokens=6, do_sample=False))


def test_routers_keep_their_transforms_on_disk(tmp_path, llama):
    from kvpress_moe.routers.checkpoint import load_routers, save_routers

    routers = routed(llama, True)
    save_routers(routers, tmp_path)
    loaded = load_routers(tmp_path).key_transforms
    assert {idx: transform.hash for idx, transform in loaded.items()} == {
        idx: transform.hash for idx, transform in routers.key_transforms.items()
    }
    broken = replace(routers.key_transforms[0], synthesis=torch.zeros_like(routers.key_transforms[0].synthesis))
    routers.key_transforms[0] = broken
    save_routers(routers, tmp_path)
    with pytest.raises(CheckpointError, match="key transforms"):
        load_routers(tmp_path)
    routers.key_transforms = None
    save_routers(routers, tmp_path)
    assert load_routers(tmp_path).key_transforms is None


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["tiers"][0].update(precision=[7, 4]),
        lambda facts: facts["tiers"][0].update(keys="whole"),
        lambda facts: facts["tiers"][0]["lengths"][0].__setitem__(0, 10**9),
        lambda facts: facts["tiers"][0]["lengths"][0].__setitem__(0, -1),
        lambda facts: facts["tiers"].pop(),
        lambda facts: facts.update(n_read=-5),
        lambda facts: facts.update(dtype="int8"),
        lambda facts: facts.update(transform="../../etc/passwd"),
        lambda facts: facts.update(n_positions=3),
        lambda facts: facts.update(angles=["x"]),
        lambda facts: facts.update(tiers="many"),
    ],
)
def test_a_packed_file_with_other_facts_is_refused(tmp_path, llama, change):
    """The digest is made anew, so that only the checks of the facts can notice."""
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from kvpress_moe.cache.saved_cache import _digest
    from kvpress_moe.routers.checkpoint import save_routers

    input_ids, routers = tokens(60), routed(llama, True)
    save_routers(routers, tmp_path / "routers")
    cache = prefill(llama, input_ids, press_of(llama, router=routers, budget="global"))
    path = save_cache(tmp_path / "book.kv", cache, llama, input_ids)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    change(header["layers"][0])
    tensors, text = load_file(path), json.dumps(header)
    save_file(tensors, path, {"header": text, "sha256": _digest(text, tensors)})
    with pytest.raises(CheckpointError, match="cache: "):
        load_cache(path, llama, tmp_path / "routers")
