"""
kvpress's generic test matrix on our press: every wrapper that takes a scorer takes this one, with the lengths that the
wrapper promises. Then what is ours: in a cache that is compressed again and again the order and the sinks survive, and
ChunkPress's chunks are judged by the positions they really have.
"""

from functools import cached_property

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BlockPress,
    CAMPress,
    ChunkKVPress,
    ChunkPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DecodingPress,
    DMSPress,
    KeyRerotationPress,
    KnormPress,
    MergingPress,
    PrefillDecodingPress,
    SnapKVPress,
)
from kvpress.utils import compute_n_kept
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.errors import SettingError
from kvpress_moe.experts.kvpress_scorers import KVPRESS_EXPERTS
from kvpress_moe.experts.registry import NAMED_EXPERTS
from tests.tiny import (
    calibrated_routers,
    distinct_tokens,
    kept_positions,
    lengths,
    overlap,
    prefill,
    tiny_model,
    tokens,
)

PROMPT = 128
TARGET, INTERVAL = 48, 3


@pytest.fixture(scope="module")
def model():
    """A Llama of our own: kvpress's head-wise wrappers leave `masked_key_indices` on the layers."""
    return tiny_model("llama")


def all_pairs(n_tokens, ratio):
    return n_tokens


def pairs_of_chunks(n_tokens, ratio):
    return sum(compute_n_kept(min(24, n_tokens - start), ratio) for start in range(0, n_tokens, 24))


def pairs_of_whole_chunks(n_tokens, ratio):
    return 8 * compute_n_kept(n_tokens // 8, ratio)


def pairs_kept_twice(n_tokens, ratio):
    return compute_n_kept(compute_n_kept(n_tokens, ratio), ratio)


#: name: (wrapper, pairs that stay per layer and head); head-wise wrappers mask keys and free nothing
WRAPPERS = {
    "none": (lambda press: press, compute_n_kept),
    "composed": (lambda press: ComposedPress([press]), compute_n_kept),
    "composed of two": (lambda press: ComposedPress([KnormPress(press.compression_ratio), press]), pairs_kept_twice),
    "composed twice": (lambda press: ComposedPress([press, press]), pairs_kept_twice),
    "key rerotation": (KeyRerotationPress, compute_n_kept),
    "adakv": (AdaKVPress, all_pairs),
    "chunk": (lambda press: ChunkPress(press, chunk_length=24), pairs_of_chunks),
    "chunkkv": (lambda press: ChunkKVPress(press, chunk_length=8), pairs_of_whole_chunks),
    "block": (lambda press: BlockPress(press, block_size=32), compute_n_kept),
    "criticalkv": (CriticalKVPress, compute_n_kept),
    "criticaladakv": (CriticalAdaKVPress, all_pairs),
    "dms": (lambda press: DMSPress(press, threshold=-0.5, sliding_window_size=32), all_pairs),
    "merging": (MergingPress, compute_n_kept),
    "prefill and decoding": (
        lambda press: PrefillDecodingPress(press, DecodingPress(MoERouterPress())),
        compute_n_kept,
    ),
}
EXPERTS = {"guide": None, "strong": "strong", "queries": ["expected_attention", "selective", "snapkv", "tova"]}
BATCHED = [name for name, (_, n_left) in WRAPPERS.items() if n_left is not all_pairs]


def wrapped(name, press):
    return WRAPPERS[name][0](press)


def n_left(name, ratio):
    return WRAPPERS[name][1](PROMPT, ratio)


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("ratio", [0.2, 0.8])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_takes_the_press_and_leaves_what_it_promises(model, name, ratio, experts):
    judges = EXPERTS[experts]
    if name in ("composed of two", "composed twice") and judges == "strong":
        judges = ["cur", "keydiff"]  # the other two need the hidden state of every pair, see the next test
    press = wrapped(name, MoERouterPress(compression_ratio=ratio, experts=judges))
    cache = prefill(model, tokens(PROMPT), press)
    assert lengths(cache) == [n_left(name, ratio)] * 2
    assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers)
    if not isinstance(press, PrefillDecodingPress):
        assert hasattr(press, "compression_ratio")


@pytest.mark.parametrize("name", ["leverage", "non_causal"])
def test_an_expert_that_needs_every_pairs_hidden_state_says_so_after_another_press(model, name):
    press = ComposedPress([KnormPress(0.2), MoERouterPress(experts=[name])])
    with pytest.raises(RuntimeError, match=f"expert '{name}' failed on layer 0 with 102 pairs"):
        prefill(model, tokens(PROMPT), press)


@pytest.mark.parametrize("name", WRAPPERS)
def test_generation_runs_in_a_wrapper(model, name):
    cache = DynamicCache()
    with wrapped(name, MoERouterPress())(model):
        output = model.generate(tokens(PROMPT), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert output.shape == (1, PROMPT + 4)
    assert lengths(cache) == [n_left(name, 0.5) + 3] * 2


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_compressed_in_a_wrapper(model, name):
    cache = prefill(model, tokens(PROMPT, 3), wrapped(name, MoERouterPress()))
    assert [layer.keys.shape[:3] for layer in cache.layers] == [(3, 2, n_left(name, 0.5))] * 2


WITH_A_RATIO = ["key rerotation", "adakv", "chunk", "block", "criticalkv", "criticaladakv", "merging"]


@pytest.mark.parametrize("name", WITH_A_RATIO)
def test_a_ratio_set_on_the_wrapper_reaches_the_press(model, name):
    inner = MoERouterPress(compression_ratio=0.2)
    press = wrapped(name, inner)
    press.compression_ratio = 0.75
    assert inner.compression_ratio == 0.75
    assert lengths(prefill(model, tokens(PROMPT), press)) == [n_left(name, 0.75)] * 2


@pytest.mark.parametrize("ratio", [0.2, 0.8])
@pytest.mark.parametrize("name", ["adakv", "criticaladakv"])
def test_headwise_wrappers_mask_the_exact_number_of_pairs(model, name, ratio):
    prefill(model, tokens(PROMPT), wrapped(name, MoERouterPress(compression_ratio=ratio)))
    n_evicted = 2 * (PROMPT - compute_n_kept(PROMPT, ratio))
    for layer in model.model.layers:
        masked = torch.stack([index.cpu() for index in layer.self_attn.masked_key_indices])  # (3, n): batch, head, pair
        assert masked.unique(dim=1).shape == masked.shape == (3, n_evicted)


@pytest.mark.parametrize("expert", [*NAMED_EXPERTS, *sorted(KVPRESS_EXPERTS.keys() - {"observed_attention"})])
@pytest.mark.parametrize("name", ["adakv", "criticalkv", "merging"])
def test_an_expert_alone_judges_in_wrappers_that_write_into_its_scores(model, name, expert):
    """One expert's scores pass through untouched, so they must be the wrapper's to write into, and no other's."""
    cache = prefill(model, tokens(PROMPT), wrapped(name, MoERouterPress(experts=[expert])))
    assert lengths(cache) == [n_left(name, 0.5)] * 2


@pytest.mark.parametrize("name", ["adakv", "criticalkv", "criticaladakv", "merging"])
def test_a_wrapper_does_not_write_into_what_an_expert_owns(model, name):
    opinion = torch.rand(1, 2, PROMPT)
    before = opinion.clone()
    prefill(model, tokens(PROMPT), wrapped(name, MoERouterPress(experts=[lambda *_: opinion])))
    assert torch.equal(opinion, before)


def test_key_rerotation_keeps_the_pairs_that_the_press_chooses(model):
    press, ids = MoERouterPress(compression_ratio=0.7, cache_aware=False, experts=["keydiff"]), distinct_tokens(PROMPT)
    alone = prefill(model, ids, press)
    rerotated = prefill(model, ids, KeyRerotationPress(press))  # it takes of equal scores which it likes
    for one, other in zip(alone.layers, rerotated.layers, strict=True):
        assert torch.equal(one.values, other.values)
        assert not torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("wrap", [AdaKVPress, KeyRerotationPress, ChunkPress, CriticalKVPress, MergingPress])
def test_a_free_budget_is_refused_by_name_in_wrappers_that_set_the_budget(model, wrap):
    with pytest.raises(ValueError, match="compression_ratio: got None, expected a number inside a kvpress wrapper"):
        prefill(model, tokens(PROMPT), wrap(MoERouterPress(compression_ratio=None)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"none"}))
def test_a_padded_batch_is_refused_in_a_wrapper(model, name, side):
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :7] = 0
    mask = mask if side == "left" else mask.flip(1)
    press = wrapped(name, MoERouterPress())
    with torch.no_grad(), pytest.raises(ValueError, match="padded batch"), press(model):
        model(tokens(PROMPT, 2), attention_mask=mask, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["adakv", "chunk", "criticalkv"])
def test_wrappers_that_would_evict_from_sliding_layers_are_refused(name):
    """kvpress skips sliding layers in its multimodal Gemma only; in a text-only one, its wrappers would cut them."""
    model = tiny_model("gemma3_text")
    with pytest.raises(ValueError, match="slid"):
        prefill(model, tokens(PROMPT), wrapped(name, MoERouterPress()), DynamicCache(config=model.config))


@pytest.mark.parametrize("name", ["adakv", "chunk", "criticalkv", "composed"])
def test_wrappers_leave_the_sliding_layers_of_the_multimodal_gemma_alone(name):
    model = tiny_model("gemma3")
    cache = prefill(model, tokens(PROMPT), wrapped(name, MoERouterPress()), DynamicCache(config=model.config))
    assert lengths(cache) == [15, n_left(name, 0.5), n_left(name, 0.5)]


# ── ChunkPress ───────────────────────────────────────────────────────────────────────────────────────────────────────


def attention_kwargs(model, input_ids):
    """What each attention layer of a forward pass is called with."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
        for layer in model.model.layers
    ]
    cache = prefill(model, input_ids)
    for hook in hooks:
        hook.remove()
    return seen, cache


def rotated_by(kwargs, start, end):
    """The attention layer's arguments with the position embeddings of tokens start to end."""
    return {**kwargs, "position_embeddings": tuple(table[:, start:end] for table in kwargs["position_embeddings"])}


@pytest.mark.parametrize("start", [0, 96])
def test_a_chunk_is_scored_with_its_own_rotary_positions(model, start):
    kwargs, cache = attention_kwargs(model, tokens(192))
    end = start + 96
    for layer, called_with, pairs in zip(model.model.layers, kwargs, cache.layers, strict=True):
        module, hidden = layer.self_attn, called_with["hidden_states"]
        chunk = (module, hidden[:, start:end], pairs.keys[:, :, start:end], pairs.values[:, :, start:end], None)
        right = SnapKVPress().score(*chunk, rotated_by(called_with, start, end))
        of_the_end = SnapKVPress().score(*chunk, called_with)  # what kvpress's ChunkPress gets
        scores = MoERouterPress(experts=["snapkv"]).score(*chunk, called_with)
        torch.testing.assert_close(scores, right)
        assert torch.allclose(right, of_the_end) == (start == 96)


def test_chunk_press_keeps_what_the_right_positions_say(model):
    kwargs, full = attention_kwargs(model, tokens(192))
    press = ChunkPress(MoERouterPress(compression_ratio=0.2, experts=["snapkv"]), chunk_length=96)
    kept = kept_positions(full, prefill(model, tokens(192), press))
    for layer, called_with, pairs, positions in zip(model.model.layers, kwargs, full.layers, kept, strict=True):
        for number, (start, end) in enumerate([(0, 96), (96, 192)]):
            chunk = (
                layer.self_attn, called_with["hidden_states"][:, start:end],
                pairs.keys[:, :, start:end], pairs.values[:, :, start:end], None,
            )  # fmt: skip
            scores = SnapKVPress().score(*chunk, rotated_by(called_with, start, end))
            best = start + scores.topk(76).indices  # 64 pairs of the window, and 12 of the 32 before it
            assert overlap(positions[..., 76 * number : 76 * (number + 1)], best) == 1


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DECODING = {
    "decoding": DecodingPress,
    "cam": CAMPress,
    "prefill and decoding": lambda *args: PrefillDecodingPress(MoERouterPress(), DecodingPress(*args)),
}


class TaggedCache(DynamicCache):
    """Writes each pair's position into its value's first channel, where it stays readable after compression."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        value_states, n_new = value_states.clone(), value_states.shape[2]
        start = self.n_seen.get(layer_idx, 0)
        self.n_seen[layer_idx] = start + n_new
        value_states[..., 0] = torch.arange(start, start + n_new) / 1024  # a power of two: exact
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @cached_property
    def n_seen(self):
        return {}

    @property
    def positions(self):
        """Per layer the positions of the pairs left, (B, H, K), in cache order."""
        return [(layer.values[..., 0] * 1024).long() for layer in self.layers]


def decode(model, press, n_prompt=PROMPT, n_new=30, batch_size=1, cache=None):
    """A prompt, and ``n_new`` - 1 decoding steps after it, under a press."""
    cache = DynamicCache() if cache is None else cache
    settings = {"past_key_values": cache, "max_new_tokens": n_new, "do_sample": False}
    with press(model):
        model.generate(tokens(n_prompt, batch_size), **settings)
    return cache


@pytest.mark.parametrize(
    "experts", [None, ["streaming_llm"], ["selective"], ["knorm", "keydiff", "tova", "snapkv"]], ids=str
)
@pytest.mark.parametrize("n_prompt", [20, 60, 128])
@pytest.mark.parametrize("wrap", DECODING.values(), ids=DECODING)
def test_decoding_bounds_the_cache(model, wrap, n_prompt, experts):
    press = wrap(MoERouterPress(compression_ratio=None, experts=experts), INTERVAL, TARGET)
    cache = decode(model, press, n_prompt, n_new=60)
    assert all(TARGET <= length <= TARGET + INTERVAL for length in lengths(cache))


@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_decoding_to_a_share_keeps_the_share_of_all_tokens_seen(model, ratio):
    press = CompressionRatioDecodingPress(
        MoERouterPress(), compression_interval=INTERVAL, target_compression_ratio=ratio
    )
    seen = PROMPT + 30 - 1
    share = int(seen * (1 - ratio))
    assert all(share - INTERVAL <= length <= share + INTERVAL for length in lengths(decode(model, press)))


@pytest.mark.parametrize("name", ["leverage", "non_causal", "compactor"])
def test_an_expert_for_prompts_only_says_so_while_decoding(model, name):
    press = DecodingPress(MoERouterPress(experts=[name]), INTERVAL, TARGET)
    with pytest.raises(RuntimeError, match=f"expert '{name}' failed on layer 0 with 131 pairs and hidden states of 3"):
        decode(model, press)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("experts", [None, ["streaming_llm"], ["knorm", "keydiff", "selective"]], ids=str)
def test_a_cache_compressed_again_and_again_stays_in_order(model, experts, batch_size):
    press = DecodingPress(MoERouterPress(experts=experts), INTERVAL, TARGET)
    for positions in decode(model, press, batch_size=batch_size, cache=TaggedCache()).positions:
        assert bool((positions.diff(dim=-1) > 0).all())
        assert bool((positions[..., -1] == PROMPT + 30 - 2).all())  # the newest token's pair was just appended


@pytest.mark.parametrize("prefill_ratio", [0, 0.5])
def test_the_sinks_and_the_latest_tokens_survive_every_compression(model, prefill_ratio):
    """kvpress leaves pairs in score order, so that its StreamingLLM loses the sinks at the second compression."""
    decoding = DecodingPress(MoERouterPress(experts=["streaming_llm"]), INTERVAL, TARGET)
    prefilling = MoERouterPress(experts=["streaming_llm"], compression_ratio=prefill_ratio)
    press = PrefillDecodingPress(prefilling, decoding)
    n_new = 1 + 9 * INTERVAL  # the last step compresses
    newest = PROMPT + n_new - 1
    expected = torch.tensor([*range(4), *range(newest - TARGET + 4, newest)])
    for positions in decode(model, press, n_new=n_new, cache=TaggedCache()).positions:
        assert torch.equal(positions, expected.expand_as(positions))


def test_default_experts_keep_the_first_and_the_latest_tokens_while_decoding(model):
    press = DecodingPress(MoERouterPress(), INTERVAL, TARGET)
    n_new = 1 + 9 * INTERVAL
    newest = PROMPT + n_new - 1
    for positions in decode(model, press, n_new=n_new, cache=TaggedCache()).positions:
        assert bool((positions[..., :4] == torch.arange(4)).all())
        assert bool((positions[..., -4:] == torch.arange(newest - 4, newest)).all())


@pytest.mark.parametrize("interval", [3, 8])
def test_the_newest_queries_are_rotated_by_their_own_positions_while_decoding(model, interval):
    seen = []

    def expert(module, hidden_states, keys, values, attentions, kwargs):
        seen.append((hidden_states.shape[1], kwargs["position_embeddings"], kwargs["position_ids"].max().item()))
        return keys.norm(dim=-1)

    decode(model, DecodingPress(MoERouterPress(experts=[expert]), interval, TARGET), n_new=20)
    assert seen
    for q_len, (cos, sin), newest in seen:
        assert q_len == interval
        positions = torch.arange(newest - interval + 1, newest + 1)[None]
        expected_cos, expected_sin = model.model.rotary_emb(torch.zeros(1), positions)
        torch.testing.assert_close(cos, expected_cos)
        torch.testing.assert_close(sin, expected_sin)


def test_dms_masks_while_decoding(model):
    press = DMSPress(MoERouterPress(), threshold=0.3, sliding_window_size=32, decoding=True)
    assert lengths(decode(model, press)) == [PROMPT + 29] * 2
    assert 0 < press.compression_ratio < 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda press: ComposedPress([press]),
        lambda press: PrefillDecodingPress(press, DecodingPress(KnormPress())),
    ],
    ids=["composed", "prefill and decoding"],
)
def test_trained_routers_keep_equal_heads_in_wrappers_that_store_the_result(llama, wrap):
    """Their budget is global where the press itself is in use; nobody asked for that here."""
    press = MoERouterPress(0.5, router=calibrated_routers(llama))
    assert lengths(prefill(llama, tokens(PROMPT), wrap(press))) == [PROMPT // 2] * 2
    shared = MoERouterPress(0.5, router=calibrated_routers(llama), budget="global")
    with pytest.raises(SettingError, match="^budget: got .*inside a kvpress wrapper"):
        prefill(llama, tokens(PROMPT), wrap(shared))
