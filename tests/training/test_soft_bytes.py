"""The soft byte budget is the hard one at low temperature; its gradient is that of the whole choice, price included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpress_moe.budget.byte_allocation import allocate_bytes
from kvpress_moe.training.end_to_end import forbid
from kvpress_moe.training.soft_bytes import draw_share, soft_strategies

NBYTES = torch.tensor([0, 38, 46, 54, 70, 86, 140, 256])


def log_costs_of(seed, pairs=200, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(pairs, generator=generator, dtype=dtype) * 3
    losses = torch.rand(len(NBYTES) - 2, pairs, generator=generator, dtype=dtype).sort(0, descending=True).values.log()
    return torch.cat((weights[None], weights + losses, torch.full((1, pairs), -torch.inf, dtype=dtype)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 0.9))
def test_at_low_temperature_the_choice_is_that_of_the_hard_budget(seed, share):
    log_costs = log_costs_of(seed)
    budget = int(share * 200 * 256)
    hard = allocate_bytes(log_costs.exp()[:, None], NBYTES, torch.tensor([budget]))[0].long()
    probs = soft_strategies(log_costs, NBYTES, budget, 1e-4).exp()
    assert (probs.argmax(0) != hard).sum() <= 3  # those at the very price
    assert (probs.amax(0) < 0.99).sum() <= 5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 0.9), temperature=st.floats(0.05, 1.0))
def test_the_expected_bytes_meet_the_budget(seed, share, temperature):
    budget = int(share * 200 * 256)
    probs = soft_strategies(log_costs_of(seed), NBYTES, budget, temperature).exp()
    assert_close(probs.sum(0), torch.ones(200, dtype=torch.float64))
    assert float((probs * NBYTES[:, None]).sum()) == pytest.approx(budget, rel=1e-3)


def test_the_gradient_contains_that_of_the_price():
    log_costs = log_costs_of(3, pairs=12).requires_grad_()
    weights = torch.randn(len(NBYTES), 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(costs):
        return (soft_strategies(costs, NBYTES, 900, 0.4).exp() * weights).sum()

    value(log_costs).backward()
    assert log_costs.grad.isfinite().all()
    for strategy, pair in ((0, 0), (2, 5), (4, 11)):
        moved = log_costs.detach().clone()
        moved[strategy, pair] += 1e-4
        up = value(moved)
        moved[strategy, pair] -= 2e-4
        assert float(log_costs.grad[strategy, pair]) == pytest.approx(
            float(up - value(moved)) / 2e-4, rel=0.01, abs=1e-4
        )


def test_what_is_forbidden_is_never_chosen_and_does_no_harm_to_gradients():
    log_costs = log_costs_of(5, pairs=120, dtype=torch.float32).view(-1, 2, 1, 60).requires_grad_()
    allowed = forbid(log_costs, whole=4, floor=10)
    probs = soft_strategies(allowed.flatten(1), NBYTES, 4000, 0.3).exp().view_as(log_costs)
    assert (probs[-1, ..., :4] == 1).all()
    assert (probs[0, ..., :4] == 0).all()
    assert (probs[0, ..., -16:] == 0).all()
    assert int((probs[0, 0, 0] == 0).sum()) == 20  # of the ten of the floor, the protected ones count
    more = forbid(log_costs, whole=4, floor=25).isinf()[0, 0, 0]
    best = log_costs[0, 0, 0, 4:-16].topk(5).indices + 4
    assert more.sum() == 25
    assert more[best].all()
    probs[1].sum().backward()
    assert log_costs.grad.isfinite().all()


def test_shares_are_drawn_evenly_on_a_log_scale():
    assert draw_share(0.03, 0.5, 0.0) == pytest.approx(0.03)
    assert draw_share(0.03, 0.5, 1.0) == pytest.approx(0.5)
    assert draw_share(0.01, 1.0, 0.5) == pytest.approx(0.1)
