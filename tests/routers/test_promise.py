"""Promises: the estimate never rises with the bytes, margins are what a search finds, and coverage holds."""

import json
import math
from dataclasses import replace

import pytest
import torch

from kvpress_moe.budget.confidence import prompts_needed
from kvpress_moe.budget.loss_curve import LossCurve
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.routers.promise import Estimate, Promise, _least_squares, share_at
from kvpress_moe.routers.sight import Sight

SHARES = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2, 0.4]).double()
N_FEATURES = 5
ABOUT = {
    "precision": "none",
    "prompts": "made",
    "routers": "a hash",
    "seed": 0,
    "min_share": 0.2,
    "top_k": 2,
    "capacity_factor": 1.5,
    "versions": {},
}


def population(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, losses and KL divergences of prompts: the divergence depends on features, losses and luck."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, N_FEATURES, generator=generator).double()
    features[:, 0] = features[:, 0] / 2 + 6  # logarithm of the number of tokens
    lost = torch.exp(-12 * SHARES + 0.3 * torch.randn(n, 1, generator=generator).double())
    luck = torch.randn(n, 1, generator=generator).double()
    noise = 0.1 * torch.randn(n, len(SHARES), generator=generator).double()
    logs = -4 + lost.log() - 0.8 * SHARES.log() + 1.8 * (features[:, :1] - 6) + 0.6 * luck + noise
    return features, lost, logs.exp()


def promise_of(n_fit: int, n: int, seed: int) -> Promise:
    fitted, new = population(n_fit, 2 * seed), population(n, 2 * seed + 1)
    estimate = Estimate.fit(*fitted, SHARES)
    return Promise.of(estimate, *new, SHARES, dict(ABOUT))


def sight(features: torch.Tensor, lost: torch.Tensor) -> Sight:
    """A sight that loses ``lost`` at the shares."""
    return Sight(LossCurve(torch.cat((torch.zeros(1), 1000 * SHARES)), torch.cat((lost[:1], lost))), features, 1000.0)


def needed(divergences: torch.Tensor, bound: float) -> float:
    """The smallest share from which on a prompt stays within the bound, by a walk over fine steps."""
    fine = torch.linspace(math.log(0.01), math.log(0.4), 1000).double()
    position = torch.searchsorted(SHARES.log(), fine).clamp(1, len(SHARES) - 1)
    left, right = SHARES.log()[position - 1], SHARES.log()[position]
    logs = torch.lerp(divergences.log()[position - 1], divergences.log()[position], (fine - left) / (right - left))
    over = (logs > math.log(bound)).nonzero()
    if len(over) == 0:
        return 0.0
    return 1.0 if int(over[-1]) == len(fine) - 1 else float(fine[int(over[-1]) + 1].exp())


def test_the_estimate_finds_what_the_divergence_depends_on_and_never_rises():
    features, lost, divergences = population(400, seed=7)
    estimate = Estimate.fit(features, lost, divergences, SHARES)
    assert estimate.weights[0] > 1.4
    assert estimate.weights[1:].abs().max() < 0.15
    assert bool((estimate.slopes >= 0).all())
    strange = torch.tensor([[3.0, 1.0, 2.0, 2.5, 0.5, 0.4]]).double()  # losses that rise in between
    assert bool((estimate.at(features[:1], strange, SHARES).diff() <= 0).all())


def test_a_slope_is_never_negative():
    features, _, divergences = population(200, seed=3)
    rising = SHARES.expand(200, -1)  # more is lost with more bytes: nonsense
    estimate = Estimate.fit(features, rising, divergences, SHARES)
    assert estimate.slopes[0] == 0
    assert estimate.slopes[1] > 0


def squared_error(estimate: Estimate, prompts: tuple[torch.Tensor, ...]) -> float:
    """Mean over the divergences that an estimate is fitted to, by a walk over them."""
    features, lost, divergences = prompts
    errors = []
    for row in range(len(features)):
        for column in range(len(SHARES)):
            log = math.log(max(float(divergences[row, column]), 1e-5))
            if math.log(1e-4) < log < 0:
                curve = estimate.slopes[0] * lost[row, column].log() - estimate.slopes[1] * SHARES[column].log()
                of_prompt = (features[row] - estimate.mean) @ estimate.weights + estimate.intercept
                errors.append(float(curve + of_prompt - log) ** 2)
    return sum(errors) / len(errors)


def test_an_adapted_estimate_keeps_what_the_features_say_only_where_it_is_true():
    estimate = Estimate.fit(*population(300, seed=7), SHARES)

    def factor(new: tuple[torch.Tensor, ...]) -> float:
        adapted = estimate.adapted(*new, SHARES)
        assert squared_error(adapted, new) <= squared_error(estimate, new)
        return float(adapted.weights[0] / estimate.weights[0])

    same, shuffled = [], []
    for seed in range(8):
        features, lost, divergences = population(40, seed=100 + seed)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        same.append(factor((features, lost, divergences)))
        shuffled.append(factor((features[order], lost, 3 * divergences)))
        assert factor((2 * features.mean(0) - features, lost, divergences)) == 0
        assert factor((features, lost, divergences * ((features[:, :1] - 6) * 1.8).exp())) == 1
    assert sum(same) / 8 > 0.85
    assert sum(shuffled) / 8 < 0.2


def test_an_adapted_estimate_is_the_best_of_its_neighbours():
    estimate = Estimate.fit(*population(300, seed=7), SHARES)
    for new in (population(30, seed=10), population(30, seed=11)):
        found = estimate.adapted(*new, SHARES)
        least = squared_error(found, new)
        for step in (-0.02, 0.02):
            assert squared_error(replace(found, intercept=found.intercept + step), new) > least
            for side in (0, 1):
                slopes = found.slopes + step * torch.eye(2)[side].double()
                assert squared_error(replace(found, slopes=slopes), new) > least
        assert squared_error(replace(found, weights=0.98 * found.weights), new) > least


def test_the_best_weights_within_their_bounds_are_found_where_dropping_the_wrong_ones_misses_them():
    """Small problems with any signs: no point of a fine grid of slopes and factors has a smaller error."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        inputs, wanted = torch.randn(12, 3, generator=generator).double(), torch.randn(12, generator=generator).double()
        weights, intercept = _least_squares(inputs, wanted)
        assert bool((weights >= 0).all())
        assert weights[2] <= 1
        least = (inputs @ weights + intercept - wanted).square().sum()
        axis = torch.linspace(0, 2, 21).double()
        grid = torch.cartesian_prod(axis, axis, torch.linspace(0, 1, 11).double())
        rest = wanted - (inputs @ grid.T).T
        assert least <= (rest - rest.mean(1, keepdim=True)).square().sum(1).min() + 1e-3


def test_too_few_divergences_are_no_ground_for_an_estimate():
    estimate = Estimate.fit(*population(60, seed=7), SHARES)
    features, lost, divergences = population(20, seed=8)
    for bad in ((features[:1], lost[:1], divergences[:1]), (features, lost, divergences * 1e-9)):
        with pytest.raises(SettingError, match="adapt: got .* at least 20 KL divergences"):
            estimate.adapted(*bad, SHARES)


@pytest.mark.parametrize("bound", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("confidence", [0.8, 0.9])
@pytest.mark.parametrize("n_adapting", [0, 8])
def test_new_prompts_stay_within_the_bound_as_often_as_promised(bound, confidence, n_adapting):
    kept, spent = [], []
    for seed in range(25):
        promise = promise_of(60, 99, seed)
        if n_adapting:
            adapted = promise.estimate.adapted(*population(n_adapting, 2000 + seed), SHARES)
            promise = Promise.of(adapted, *population(99, 2 * seed + 1), SHARES, dict(ABOUT))
        features, lost, divergences = population(40, 1000 + seed)
        for one in range(40):
            share = promise.decide(sight(features[one], lost[one]), bound, confidence).share
            kept.append(share >= needed(divergences[one], bound) * (1 - 4e-3))
            spent.append(share)
    coverage = sum(kept) / len(kept)
    assert confidence - 0.03 <= coverage <= confidence + 0.07, coverage
    assert sum(spent) / len(spent) < 0.5


def test_margins_are_what_a_search_finds():
    promise = promise_of(60, 40, seed=2)
    for bound in (0.01, 0.05):
        margins = promise.margins(bound)
        for row in range(40):
            wanted = needed(promise.divergences[row].exp(), bound)
            if wanted in (0.0, 1.0):
                assert margins[row] == (-torch.inf if wanted == 0 else torch.inf)
                continue
            for step, fits in ((0.02, True), (-0.02, False)):
                given = share_at(promise.estimates[row], SHARES, math.log(bound) - float(margins[row]) - step)
                assert (given >= wanted * (1 - 4e-3)) == fits


def test_more_confidence_and_a_lower_bound_keep_more():
    promise = promise_of(60, 99, seed=4)
    features, lost, _ = population(1, seed=5)
    seen = sight(features[0], lost[0])
    by_bound = [promise.decide(seen, bound, 0.9).share for bound in (0.1, 0.05, 0.02, 0.01, 0.005)]
    by_confidence = [promise.decide(seen, 0.02, confidence).share for confidence in (0.5, 0.7, 0.9, 0.98)]
    assert by_bound == sorted(by_bound)
    assert by_confidence == sorted(by_confidence)
    assert by_bound[0] < by_bound[-1]


def test_a_prompt_unlike_the_others_gets_the_margin_of_a_higher_confidence():
    promise = promise_of(60, 99, seed=4)
    features, lost, _ = population(1, seed=5)
    usual = promise.decide(sight(features[0], lost[0]), 0.02, 0.9)
    unlike = promise.decide(sight(features[0] + torch.tensor([0.0, 9, 9, 9, 9]), lost[0]), 0.02, 0.9)
    assert not usual.is_unlike
    assert unlike.is_unlike
    margin = promise.margin(0.02, 0.975)  # a quarter of the prompts that may exceed the bound
    far = features[0] + torch.tensor([0.0, 9, 9, 9, 9])
    estimates = promise.estimate.at(far[None], lost, SHARES)[0]
    assert unlike.share == share_at(estimates, SHARES, math.log(0.02) - margin)


def test_a_prompt_much_longer_than_all_others_is_unlike_them():
    promise = promise_of(60, 99, seed=4)
    shortest, longest = promise.lengths
    for n_tokens, unlike in ((shortest, False), (longest, False), (1.5 * longest, True), (0.5 * shortest, True)):
        features = promise.centre.clone()
        features[0] = math.log(n_tokens)
        assert bool(promise.are_unlike(features[None])) == unlike, n_tokens


def test_without_whole_pairs_a_share_of_1_still_loses_something():
    promise = promise_of(60, 99, seed=4)
    features, lost, _ = population(1, seed=5)
    seen = sight(features[0], lost[0])
    whole = promise.decide(seen, 0.02, 0.9, least=1.0)
    coded = promise.decide(seen, 0.02, 0.9, least=1.0, has_whole=False)
    assert whole.expected_kl == 0
    assert coded.expected_kl > 0


def test_hard_bounds_hold_and_a_broken_promise_says_so():
    promise = promise_of(60, 99, seed=4)
    features, lost, _ = population(1, seed=5)
    seen = sight(features[0], lost[0])
    free = promise.decide(seen, 0.02, 0.9)
    assert free.is_enough
    less = promise.decide(seen, 0.02, 0.9, most=free.share / 2)
    assert less.share == free.share / 2
    assert not less.is_enough
    assert less.expected_kl > free.expected_kl
    more = promise.decide(seen, 0.02, 0.9, least=0.7)
    assert more.share == 0.7
    assert more.is_enough


def test_what_was_not_measured_is_not_promised():
    promise = promise_of(60, 40, seed=1)
    low, high = promise.bounds
    promise.check((low * high) ** 0.5, 0.9)
    for bound in (low / 2, high * 2):
        with pytest.raises(SettingError, match="max_kl: got .* calibrated range"):
            promise.check(bound, 0.9)
    with pytest.raises(SettingError, match="confidence: got 0.99, expected at most 0.9756 .* needs 99 prompts"):
        promise.check((low * high) ** 0.5, 0.99)


def test_how_many_prompts_a_confidence_needs():
    assert [prompts_needed(confidence) for confidence in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_a_promise_survives_a_file():
    promise = promise_of(60, 99, seed=4)
    text = json.dumps(promise.as_dict())
    again = Promise.from_dict(json.loads(text), N_FEATURES)
    features, lost, _ = population(30, seed=9)
    for one in range(30):
        seen = sight(features[one], lost[one])
        assert again.decide(seen, 0.02, 0.9).share == pytest.approx(promise.decide(seen, 0.02, 0.9).share, rel=0.03)
    assert again.about == ABOUT


@pytest.mark.parametrize(
    "change",
    [
        {"shares": [0.1, 0.05, 0.2, 0.3, 0.4, 0.5]},
        {"shares": [0.1]},
        {"slopes": [-1.0, 0.5]},
        {"slopes": [1.0, 0.0]},
        {"intercept": 1e300},
        {"lengths": [0, 5]},
        {"lengths": 5},
        {"farthest": float("inf")},
        {"estimates": [[0, 1, 1, 1, 1, 1]] * 20},
        {"spread": [0.0] * N_FEATURES},
        {"correlation": [-10_000] * 15},
        {"correlation": [10_000] * 14},
        {"weights": [1.0] * 3},
        {"mean": [float("nan")] * N_FEATURES},
        {"divergences": []},
        {"intercept": "high"},
        {"about": {}},
        {"about": {**ABOUT, "top_k": 0}},
    ],
    ids=str,
)
def test_a_broken_file_is_refused(change):
    saved = promise_of(60, 20, seed=4).as_dict() | change
    with pytest.raises((ValueError, TypeError, KeyError)):
        Promise.from_dict(saved, N_FEATURES)


def test_features_of_another_model_are_refused():
    promise = promise_of(60, 20, seed=4)
    _, lost, _ = population(1, seed=5)
    with pytest.raises(CheckpointError, match="4 compressed KV heads, this one has 7"):
        promise.decide(sight(torch.zeros(8).double(), lost[0]), 0.02, 0.9)


def test_a_combination_of_usual_features_can_be_unlike():
    """Two features that always agree: prompts in which they differ are far, though each is as usual."""
    generator = torch.Generator().manual_seed(0)
    features, lost, divergences = population(200, seed=3)
    features[:, 2] = features[:, 1] + 0.05 * torch.randn(200, generator=generator).double()
    estimate = Estimate.fit(features[:100], lost[:100], divergences[:100], SHARES)
    promise = Promise.of(estimate, features[100:], lost[100:], divergences[100:], SHARES, dict(ABOUT))
    agree, differ = promise.centre.clone(), promise.centre.clone()
    agree[1:3] += 1
    differ[1] += 1
    differ[2] -= 1
    assert promise.are_unlike(torch.stack((agree, differ))).tolist() == [False, True]
    assert promise.are_unlike(features[100:]).double().mean() < 0.08
