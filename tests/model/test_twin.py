"""A twin has the weights of its model, not copies, and its own hooks."""

import torch

from kvpress_moe.model.twin import twin_of
from tests.tiny import tiny_model, tokens


def test_a_twin_computes_the_same_with_the_same_weights_and_without_the_hooks_of_the_other():
    model = tiny_model("llama", tie_word_embeddings=True)
    twin, calls = twin_of(model), []
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert [b.data_ptr() for b in twin.buffers()] == [b.data_ptr() for b in model.buffers()]
    twin.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits = model(tokens(9)).logits
        assert not calls
        assert torch.equal(twin(tokens(9)).logits, logits)
    assert len(calls) == 1
