"""The routing of cached tokens is remembered per head, in cache order; what nobody saw gets the mean."""

import torch
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.press.routing_memory import RoutingMemory
from tests.tiny import tokens

E = 3


def call(llama, cache, n_cached, n_new):
    """A call with ``n_new`` hidden states about ``n_cached`` pairs of two heads."""
    keys = torch.zeros(1, 2, n_cached, 8)
    hidden_states = llama.model.embed_tokens(tokens(n_new)).detach()
    kwargs = {"past_key_values": cache, "hidden_states": hidden_states[:, -1:]}
    return LayerCall(llama.model.layers[0].self_attn, hidden_states, keys, keys, None, kwargs)


def random_weights(*shape):
    return torch.rand(*shape, E, generator=torch.Generator().manual_seed(sum(shape))).softmax(-1)


def test_remembered_unseen_and_new_tokens_stand_in_cache_order(llama):
    memory, cache = RoutingMemory(), DynamicCache()
    routed = random_weights(1, 1, 10)
    indices = torch.tensor([[[0, 3, 4, 9], [1, 2, 5, 6]]])
    memory.remember(call(llama, cache, 10, 10), routed, indices)
    fresh = random_weights(1, 2)
    aligned = memory.align(call(llama, cache, 4 + 3, 2), fresh)  # three tokens came since, two hidden states are left
    for head in range(2):
        remembered = routed[0, 0, indices[0, head]]
        seen = torch.cat((remembered, fresh[0]))
        expected = torch.cat((remembered, seen.mean(0, keepdim=True), fresh[0]))
        assert_close(aligned[0, head], expected)


def test_a_prompt_needs_no_memory(llama):
    fresh = random_weights(1, 6)
    assert torch.equal(RoutingMemory().align(call(llama, DynamicCache(), 6, 6), fresh)[:, 0], fresh)


def test_tokens_that_were_never_routed_get_the_mean_of_those_that_were(llama):
    fresh = random_weights(1, 2)
    aligned = RoutingMemory().align(call(llama, DynamicCache(), 5, 2), fresh)
    assert_close(aligned[0, 0], torch.cat((fresh[0].mean(0, keepdim=True).expand(3, -1), fresh[0])))


def test_keys_that_were_pruned_by_somebody_else_get_the_mean(llama):
    fresh = random_weights(1, 8)
    aligned = RoutingMemory().align(call(llama, DynamicCache(), 4, 8), fresh)
    assert_close(aligned[0, 0], fresh[0].mean(0, keepdim=True).expand(4, -1))


def test_another_cache_is_not_mistaken_for_the_remembered_one(llama):
    memory, fresh = RoutingMemory(), random_weights(1, 1)
    weights, indices = random_weights(1, 1, 10), torch.zeros(1, 2, 4, dtype=torch.int64)
    memory.remember(call(llama, DynamicCache(), 10, 10), weights, indices)
    aligned = memory.align(call(llama, DynamicCache(), 5, 1), fresh)
    assert_close(aligned[0, 0], fresh[0].expand(5, -1))
