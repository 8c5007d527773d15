"""Byte budgets: exact, never exceeded, and as good as a naive search over prices."""

import itertools

import pytest
import torch

from kvpress_moe.budget.byte_allocation import allocate_bytes
from kvpress_moe.budget.shared_bytes import ByteBudget, SharedBytes, decide_strategies, strategy_costs
from kvpress_moe.budget.switch_prices import switch_prices

NBYTES = torch.tensor([0, 40, 56, 88, 136, 256])


def costs_of(n_groups: int, n_pairs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_groups, n_pairs, generator=generator).mul(2).exp()
    losses = (
        torch.rand(6, n_groups, n_pairs, generator=generator)
        * torch.tensor([1, 0.2, 0.05, 0.01, 0.001, 0])[:, None, None]
    )
    losses[0] = 1
    return weights * losses


@pytest.mark.parametrize("share", [0.001, 0.04, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("n_pairs", [37, 5000])
def test_the_budget_is_met_to_less_than_one_pair(n_pairs, share):
    costs = costs_of(3, n_pairs)
    budget = torch.tensor([int(share * n_pairs * 256), int(share * n_pairs * 128), int(share * n_pairs * 64)])
    chosen = allocate_bytes(costs, NBYTES, budget)
    taken = NBYTES[chosen.long()].sum(1)
    assert (taken <= budget).all()
    assert (budget - taken < 256).all()


@pytest.mark.parametrize("share", [0.04, 0.25])
@pytest.mark.parametrize("n_groups", [1, 4])
def test_all_pairs_but_those_at_the_price_take_what_a_slow_bisection_of_all_pairs_gives_them(n_groups, share):
    costs, budget = costs_of(n_groups, 6000, seed=5), torch.full((n_groups,), int(share * 6000 * 256))
    chosen = allocate_bytes(costs, NBYTES, budget)
    for group in range(n_groups):
        low, high = 0.0, 1e9
        for _ in range(200):
            price = (low + high) / 2
            found = (costs[:, group].double() + price * NBYTES[:, None].double()).argmin(0)
            low, high = (price, high) if NBYTES[found].sum() > budget[group] else (low, price)
        assert (chosen[group] != found).sum() <= 2


def test_everything_stays_whole_if_it_fits():
    chosen = allocate_bytes(costs_of(2, 50), NBYTES, torch.tensor([50 * 256, 10**9]))
    assert (chosen == 5).all()


def test_no_other_choice_within_the_budget_costs_much_less():
    """Six pairs: all 46,656 choices are tried. The Lagrangian choice may miss the best by the step of one pair."""
    costs = costs_of(1, 6, seed=3)
    for budget in (200, 500, 900):
        chosen = allocate_bytes(costs, NBYTES, torch.tensor([budget]))[0]
        cost = costs[chosen.long(), 0, torch.arange(6)].sum()
        best, slightly_more = torch.inf, torch.inf
        for choice in itertools.product(range(6), repeat=6):
            own = costs[list(choice), 0, torch.arange(6)].sum()
            best = min(best, own) if NBYTES[list(choice)].sum() <= budget else best
            slightly_more = min(slightly_more, own) if NBYTES[list(choice)].sum() <= budget - 256 else slightly_more
        assert best - 1e-5 <= cost <= slightly_more + 1e-5


def test_equal_pairs_are_served_in_their_order():
    costs = torch.tensor([3.0, 2.0, 1.0])[:, None, None].expand(3, 1, 10)
    chosen = allocate_bytes(costs, torch.tensor([0, 10, 20]), torch.tensor([50]))
    assert chosen.tolist() == [[2, 2, 0, 0, 0, 0, 0, 0, 0, 0]]


def test_forbidden_strategies_are_never_chosen():
    costs = costs_of(1, 40)
    costs[0, 0, 7] = torch.inf
    costs[:-1, 0, 8] = torch.inf
    chosen = allocate_bytes(costs, NBYTES, torch.tensor([300]))[0]
    assert chosen[7] > 0
    assert chosen[8] == 5


@pytest.mark.parametrize("each_head", [False, True])
def test_each_head_keeps_its_floor_and_the_first_tokens_stay_whole(each_head):
    costs = costs_of(2 * 3, 60).view(6, 2, 3, 60)
    costs[:, :, 0] *= 1e-4  # a head whose pairs hardly matter
    chosen = decide_strategies(costs.clone(), NBYTES, ByteBudget(60 * 26, floor=5, whole=2), each_head)
    taken = NBYTES[chosen.long()].sum(-1)
    assert ((chosen > 0).sum(-1) >= 5).all()
    assert (chosen[..., :2] == 5).all()
    assert (taken <= 60 * 26).all() if each_head else (taken.sum(-1) <= 3 * 60 * 26).all()


def test_layers_that_wait_are_decided_as_one_and_rows_do_not_compete():
    shared, layers = SharedBytes(), [costs_of(2 * 3, 60, seed).view(6, 2, 3, 60).bfloat16() for seed in (1, 2)]
    for layer_idx, layer in enumerate(layers):
        shared.add(layer_idx, [(layer[:, :1], None), (layer[:, 1:], None)])
    budgets = [ByteBudget(900, 1, 0), ByteBudget(400, 1, 0)]
    seen: list[torch.Tensor] = []

    def budget_of(part: int, costs: torch.Tensor) -> ByteBudget:
        seen.append(costs.clone())
        return budgets[part]

    decided = shared.decide(NBYTES, budget_of, each_head=False)
    for row, budget in enumerate(budgets):
        pooled = torch.cat([layer[:, row : row + 1] for layer in layers], dim=2)
        assert torch.equal(seen[row], pooled)
        expected = decide_strategies(pooled, NBYTES, budget, False)
        together = torch.cat([decided[0][row][0], decided[1][row][0]], dim=1)
        assert torch.equal(together, expected)


def test_costs_fall_with_the_loss_and_grow_with_the_weight_and_are_never_infinite():
    losses = torch.tensor([0.1, 0.01, 0.0])[:, None, None, None].expand(3, 1, 1, 4)
    costs = strategy_costs(torch.tensor([[[-50.0, 0.0, 5.0, 1e9]]]), losses)
    assert costs.isfinite().all()
    assert (costs[1:] < costs[:-1]).all()
    assert (costs[0, ..., 1:] > costs[0, ..., :-1]).all()


def test_the_budget_holds_where_rounding_makes_a_lower_price_take_fewer_bytes():
    """20,000 groups of random costs, among them some in which float32 rounds so."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.randn(1000, 60, generator=generator).mul(2).exp()
        losses = torch.rand(6, 1000, 60, generator=generator)
        losses = losses.sort(0, descending=True).values
        budget = torch.randint(0, 60 * 256, (1000,), generator=generator)
        chosen = allocate_bytes(weights * losses, NBYTES, budget)
        assert (NBYTES[chosen.long()].sum(1) <= budget).all()


def test_switch_prices_tell_the_strategy_at_every_price():
    costs = torch.rand(6, 400).sort(0, descending=True).values ** 3
    costs[0, :5] = torch.inf  # these are never evicted
    costs[:-1, 5:8] = torch.inf  # these get the last strategy
    costs[2, 8:20] = costs[1, 8:20]  # a dearer strategy that gains nothing
    nbytes = torch.tensor([0, 3, 10, 12, 30, 31])
    prices = switch_prices(costs, nbytes)
    assert bool((prices[1:] <= prices[:-1]).all())
    assert bool((prices[0, :8] == torch.inf).all() & (prices[:, 5:8] == torch.inf).all())
    for price in (1e-4, 1e-3, 0.01, 0.05, 0.2):
        total = costs + price * nbytes[:, None].float()
        assert torch.equal((prices >= price).sum(0), total.argmin(0))
