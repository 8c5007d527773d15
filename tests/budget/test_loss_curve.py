"""The loss curve is what a naive loop over prices finds: bytes and losses of the strategies that pairs take there."""

import pytest
import torch

from kvpress_moe.budget import loss_curve
from kvpress_moe.budget.loss_curve import LossCurve

NBYTES = torch.tensor([0, 36, 44, 60, 128])


def costs_of(n_pairs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_pairs, generator=generator).exp()
    losses = torch.tensor([1.0, 0.1, 0.03, 0.002, 0.0])[:, None]
    return weights * losses * (1 + 0.2 * torch.rand(5, n_pairs, generator=generator))


def at_price(costs: torch.Tensor, price: float) -> tuple[float, float]:
    """Bytes and losses if every pair takes the strategy with the lowest cost plus price."""
    nbytes, lost = 0.0, 0.0
    for pair in costs.double().T:
        best = int((pair + price * NBYTES).argmin())
        nbytes += float(NBYTES[best])
        lost += float(pair[best])
    return nbytes, lost


@pytest.mark.parametrize("price", [0.3, 0.02, 0.003, 1e-4, 1e-6])
def test_the_curve_is_that_of_a_naive_loop(price):
    costs = costs_of(200)
    curve = LossCurve.of(costs[:, None], NBYTES)
    nbytes, lost = at_price(costs, price)
    assert float(curve.at(torch.tensor([nbytes]))) == pytest.approx(lost, rel=1e-5, abs=1e-6)
    assert bool((curve.nbytes == nbytes).any())


def test_it_begins_with_everything_evicted_and_never_rises():
    costs = costs_of(300, seed=1)
    curve = LossCurve.of(costs, NBYTES)
    assert float(curve.nbytes[0]) == 0
    assert float(curve.lost[0]) == pytest.approx(float(costs[0].double().sum()))
    assert bool((curve.lost.diff() <= 0).all())
    assert bool((curve.nbytes.diff() >= 0).all())
    assert float(curve.at(torch.tensor([10.0**9]))) == float(curve.lost[-1])


def test_a_sample_of_many_pairs_gives_nearly_the_same_curve(monkeypatch):
    costs = costs_of(20_000)
    whole = LossCurve.of(costs, NBYTES)
    monkeypatch.setattr(loss_curve, "SAMPLED", 5_000)
    sampled = LossCurve.of(costs, NBYTES)
    budgets = torch.tensor([0.05, 0.1, 0.2, 0.4]) * 20_000 * 128
    assert torch.allclose(sampled.at(budgets), whole.at(budgets), rtol=0.06)
    assert len(sampled.nbytes) < len(whole.nbytes)


def test_evict_or_keep_is_the_sum_of_the_worst_scores():
    weights = torch.tensor([5.0, 1.0, 3.0, 2.0])
    curve = LossCurve.of(torch.stack((weights, torch.zeros(4))), torch.tensor([0, 10]))
    assert curve.at(torch.tensor([0, 9, 10, 20, 39, 40])).tolist() == [11, 11, 6, 3, 1, 0]
