"""The rule of strategies: untrained it is the rule with constants; trained it is a formula for each pair alone."""

import math

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe.budget.shared_bytes import POWER, as_costs, strategy_costs
from kvpress_moe.codes.distortion import Distortion
from kvpress_moe.codes.precision import MIXED_TRANSFORMED, Precision
from kvpress_moe.routers.strategy_rule import StrategyRule

MENU = MIXED_TRANSFORMED


def drawn(seed=0, shape=(2, 3, 20)):
    generator = torch.Generator().manual_seed(seed)

    def losses(bits):
        return {b: torch.rand(shape, generator=generator) * 4.0**-b for b in bits}

    lost = Distortion(losses((2, 3, 4, 6, 8)), losses((2, 3, 4, 8)))
    return torch.randn(shape, generator=generator) * 3, lost, torch.randn(shape[0], shape[2], 5, generator=generator)


def trained_rule(seed=1):
    rule, generator = StrategyRule(3, 5), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rule.powers.copy_(torch.tensor([0.7, 0.9]))
        for weights in (rule.worth, rule.read.weight):
            weights.normal_(generator=generator)
    return rule


def test_a_new_rule_is_the_one_with_constants():
    scores, lost, features = drawn()
    rule = StrategyRule(3, 5)
    log_costs = rule.log_costs(scores, rule.worths(features), lost, MENU)
    assert_close(as_costs(log_costs), strategy_costs(scores, lost.total(MENU, scores)), rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("menu", [MENU, [Precision(8, 4)], [Precision(16, 4), Precision(8, 16)], [Precision(16, 16)]])
def test_costs_are_those_of_the_formula_for_each_pair(menu):
    scores, lost, features = drawn()
    rule = trained_rule().requires_grad_(False)
    log_costs = rule.log_costs(scores, rule.worths(features), lost, menu)
    assert log_costs.shape == (len(menu) + 1, 2, 3, 20)
    p, q = rule.powers.tolist()
    for b, h, s in ((0, 0, 0), (1, 2, 19), (0, 1, 7)):
        worths = [
            float(rule.worth[i, h] + rule.read.weight[3 * i + h] @ features[b, s])
            for i in range(2)  # keys, values
        ]
        assert float(log_costs[0, b, h, s]) == pytest.approx(p * float(scores[b, h, s]), rel=1e-5)
        for precision, cost in zip(menu, log_costs[1:, b, h, s].tolist(), strict=True):
            bits = (precision.key_bits, precision.value_bits)
            losses = [float(of[n][b, h, s]) if n in of else 0.0 for of, n in zip((lost.keys, lost.values), bits)]  # noqa: B905
            total = sum(math.exp(worth) * loss for worth, loss in zip(worths, losses, strict=True))
            expected = p * float(scores[b, h, s]) + q * math.log(total) if total else -math.inf
            assert cost == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_everything_in_the_rule_learns_and_nothing_becomes_nan():
    scores, lost, features = drawn()
    lost.keys[8][:] = 0.0  # a key that a code does not change at all
    scores.requires_grad_()
    rule = trained_rule()
    costs = rule.log_costs(scores, rule.worths(features), lost, MENU).exp()
    assert (costs[-1] == 0).all()
    costs.sum().backward()
    for gradient in (scores.grad, *(parameter.grad for parameter in rule.parameters())):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    assert rule.powers.tolist() != [POWER, POWER]
