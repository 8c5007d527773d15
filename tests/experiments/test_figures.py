"""Figures of experiments: tokens within a window, and spreads between and within texts, against values by hand."""

import math

import pytest
import torch

from experiments.promise_for_texts import SAME, compared, promises
from experiments.question_spread import spreads
from experiments.serve_load import tokens_within
from kvpress_moe.routers.promise import Estimate, Promise
from kvpress_moe.training.calibration import Measurement


def test_tokens_are_counted_within_the_seconds_after_the_first_question():
    answers = [
        {"started": 100.0, "first": 1.0, "whole": 5.0, "tokens": 32},  # within
        {"started": 107.0, "first": 1.0, "whole": 5.0, "tokens": 32},  # half of it is written when the time is over
        {"started": 108.0, "first": 3.0, "whole": 4.0, "tokens": 32},  # its first token comes too late
    ]
    assert tokens_within(answers, 10) == pytest.approx(32 + 16)


def test_the_spread_of_a_texts_questions_leaves_out_what_the_texts_differ_in():
    logs = torch.tensor([[-1.0, 1.0], [9.0, 11.0], [99.0, 101.0]])
    found = spreads(logs, torch.full((3, 2), 3.0))
    assert found["questions"] == pytest.approx(2**0.5)
    assert found["error"] == pytest.approx(3.0)  # an error that all prompts share counts too
    assert found["all"] == pytest.approx(float(logs.std()))


SHARES = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2, 0.4]).double()


def measured(n: int, seed: int, told: float) -> list[Measurement]:
    """Prompts whose KL divergence falls with the share; a feature tells a part ``told`` of what they differ in."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator).double()
    features[:, 0] = 7 + features[:, 0] / 10
    luck = torch.randn(n, generator=generator).double()
    level = 1.2 * (told * features[:, 1] + (1 - told) * luck)
    logs = -7 + level[:, None] - 1.3 * SHARES.log()
    lost = (0.1 / SHARES).tolist()
    return [Measurement(f, lost, d) for f, d in zip(features.tolist(), logs.exp().tolist(), strict=True)]


def as_tensors(prompts: list[Measurement]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([getattr(one, name) for one in prompts]).double() for name in Measurement.__annotations__)


def test_a_promise_for_texts_is_compared_with_one_share_for_all():
    fitted = Estimate.fit(*as_tensors(measured(200, 0, told=0.9)), SHARES)
    shipped = Promise.of(fitted, *as_tensors(measured(99, 1, told=0.9)), SHARES, {})
    for told in (0.9, 0.0):
        made = promises(shipped, measured(25, 2, told), measured(75, 3, told))
        test = measured(300, 4, told)
        found = {name: compared(promise, test, 0.02, 0.9) for name, promise in made.items()}
        assert all(of["coverage"] > 0.8 for of in found.values())
        adapted = found["shipped, adapted"]["share"]
        if told:
            assert adapted < 0.8 * found[SAME]["share"]
        else:  # nothing can be known
            assert adapted < 1.1 * found[SAME]["share"] < found["shipped"]["share"]
        # With the same share for all, it is the one that enough of the calibration prompts need.
        needs = sorted(
            0.01 * (one.divergences[0] / 0.02) ** (1 / 1.3) for one in [*measured(25, 2, told), *measured(75, 3, told)]
        )
        assert found[SAME]["share"] == pytest.approx(needs[math.ceil(101 * 0.9) - 1], rel=0.02)
        inside = [one.divergences[0] * (0.01 / found[SAME]["share"]) ** 1.3 <= 0.02 * 1.001 for one in test]
        assert found[SAME]["coverage"] == pytest.approx(sum(inside) / 300, abs=0.01)
