"""The gate routes as a loop over tokens would, within capacity, in memory linear in tokens × experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpress_moe.routers.gate import assign_experts, expert_capacity, gate, load_balance, preference_order
from tests import reference


@st.composite
def routings(draw):
    """Logits (few distinct values, so that ties are common), top_k and capacity factor."""
    n_batch, n_tokens, num_experts = draw(st.integers(1, 2)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(n_batch, n_tokens, num_experts, generator=generator)
    if draw(st.booleans()):
        logits = logits.round() if draw(st.booleans()) else logits[:, :1].expand_as(logits)  # some tokens alike, or all
    if draw(st.booleans()):
        logits = logits + 3 * torch.eye(num_experts)[0]  # everybody wants expert 0
    return logits, draw(st.integers(1, num_experts)), draw(st.sampled_from([1.0, 1.25, 1.5, 2.0]))


@settings(max_examples=150, deadline=None)
@given(routings())
def test_routing_capacity_and_losses_equal_a_naive_loop(routing):
    logits, top_k, capacity_factor = routing
    decision = gate(logits, top_k, capacity_factor)
    assert torch.equal(decision.chosen, reference.assign(logits, top_k, capacity_factor))
    torch.testing.assert_close(decision.weights, reference.weights(logits, decision.chosen))
    loss = load_balance(decision.probs, decision.chosen).item()
    assert loss == pytest.approx(reference.aux_loss(logits, decision.chosen), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(routings())
def test_weights_sum_to_one_and_no_expert_exceeds_its_capacity(routing):
    logits, top_k, capacity_factor = routing
    decision = gate(logits, top_k, capacity_factor)
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(logits.shape[:2]))
    assert torch.equal(decision.weights > 0, decision.chosen)
    per_token = decision.chosen.sum(-1)
    assert per_token.min() >= 1
    assert per_token.max() <= top_k
    capacity = expert_capacity(logits.shape[1], logits.shape[2], top_k, capacity_factor)
    assert decision.chosen.sum(1).max() <= capacity


def test_with_room_for_all_every_token_gets_exactly_top_k_experts():
    logits = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    assert (gate(logits, 2, 2.0).chosen.sum(-1) == 2).all()


def test_equal_logits_use_all_experts_equally():
    decision = gate(torch.zeros(1, 400, 4), top_k=2, capacity_factor=1.0)
    assert decision.chosen.sum((0, 1)).tolist() == [200, 200, 200, 200]
    assert load_balance(decision.probs, decision.chosen).item() == pytest.approx(1 / 4)


def test_collapse_costs_more_than_balance():
    everybody_to_one = torch.zeros(1, 100, 4)
    everybody_to_one[..., 0] = 10.0
    decision = gate(everybody_to_one, top_k=1, capacity_factor=4.0)
    assert load_balance(decision.probs, decision.chosen).item() == pytest.approx(1.0, abs=1e-3)


def test_a_full_expert_keeps_the_tokens_it_is_surest_of():
    logits = torch.zeros(1, 4, 2)
    logits[0, :, 0] = torch.tensor([1.0, 4.0, 2.0, 3.0])  # all prefer expert 0, which has room for 2
    chosen = gate(logits, top_k=1, capacity_factor=1.0).chosen
    assert chosen[0, :, 0].tolist() == [False, True, False, True]
    assert chosen[0, :, 1].tolist() == [True, False, True, False]


def test_the_company_a_prompt_keeps_does_not_change_its_routing():
    logits = torch.randn(4, 60, 5, generator=torch.Generator().manual_seed(1))
    together = gate(logits, 2, 1.0).chosen
    alone = torch.cat([gate(row[None], 2, 1.0).chosen for row in logits])
    assert torch.equal(together, alone)


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if tensor._base is None:
                self.largest = max(self.largest, tensor.nbytes)
                self.total += tensor.nbytes
        return result


def test_routing_32768_tokens_takes_memory_linear_in_tokens_times_experts(capsys):
    measured = {}
    for n_tokens in (8192, 16384, 32768):
        logits = torch.randn(1, n_tokens, 8, generator=torch.Generator().manual_seed(0))
        logits[..., 0] += 2  # expert 0 overflows: the long way through assign_experts
        probs, order = logits.softmax(-1), preference_order(logits)
        with Allocations() as allocations:
            assign_experts(probs, order, 2, expert_capacity(n_tokens, 8, 2, 1.5))
        measured[n_tokens] = allocations
    with capsys.disabled():
        print()
        for n_tokens, allocations in measured.items():
            print(
                f"  routing {n_tokens:>6} tokens to 8 experts: largest tensor {allocations.largest / 2**20:.1f} MiB "
                f"= {allocations.largest / (n_tokens * 8):.0f} bytes per token and expert"
            )
    for n_tokens, allocations in measured.items():
        assert allocations.largest <= 8 * n_tokens * 8  # one 64-bit number per token and expert
    assert measured[32768].total <= 2.05 * measured[16384].total
