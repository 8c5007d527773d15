"""Experts' scores are compared by rank; the mixture is the weighted mean that a loop would compute."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress_moe.experts.mixing import mix, mix_calibrated, rank_within_head
from tests import reference


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_ranks_equal_a_naive_loop_also_with_ties(n_tokens, coarse, seed):
    scores = torch.randn(2, 3, n_tokens, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if coarse else scores
    torch.testing.assert_close(rank_within_head(scores), reference.ranks(scores))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(2, 4), st.booleans(), st.integers(0, 2**31))
def test_the_mixture_equals_a_naive_loop(n_tokens, num_experts, per_head, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, 3, n_tokens, generator=generator) * 10**e for e in range(num_experts)]
    weights = torch.rand(2, 3 if per_head else 1, n_tokens, num_experts, generator=generator)
    mixed = mix(scores.__getitem__, range(num_experts), weights)
    torch.testing.assert_close(mixed, reference.mixed(scores, weights))


def test_equal_weights_give_the_mean_of_ranks():
    scores = torch.randn(4, 1, 2, 50, generator=torch.Generator().manual_seed(0))
    mixed = mix(scores.__getitem__, range(4), torch.full((1, 1, 50, 4), 0.25))
    torch.testing.assert_close(mixed, torch.stack([rank_within_head(s) for s in scores]).mean(0))


def test_one_expert_alone_passes_through_bit_for_bit():
    scores = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    assert mix(lambda expert: scores, [2], torch.ones(1, 1, 9, 3)) is scores


def test_scale_and_shift_of_a_scorer_do_not_matter():
    scores = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rank_within_head(scores), rank_within_head(scores * 1e30 - 7e29))


def test_experts_that_nobody_was_routed_to_are_not_computed():
    asked = []

    def score(expert):
        asked.append(expert)
        return torch.rand(1, 1, 5)

    mix(score, [0, 2], torch.tensor([0.5, 0.0, 0.5]).expand(1, 1, 5, 3))
    assert asked == [0, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(2, 4), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_the_calibrated_sum_equals_a_naive_loop(n_tokens, num_experts, per_head, one_idle, seed):
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(2, num_experts, 3, n_tokens, generator=generator)
    weights = torch.rand(2, 3 if per_head else 1, n_tokens, num_experts, generator=generator)
    active = list(range(num_experts))
    if one_idle:
        weights[..., active.pop(0)] = 0
    offset = torch.randn(3, generator=generator)
    mixed = mix_calibrated(terms[:, active], active, weights, offset)
    torch.testing.assert_close(mixed, reference.mixed_calibrated(terms, weights, offset))


def test_numpy_and_torch_sort_alike(monkeypatch):
    scores = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    scores[0, 0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, torch.nan])
    ours = rank_within_head(scores)
    monkeypatch.setattr("kvpress_moe.experts.mixing.sorting", lambda scores: scores.argsort(dim=-1))
    torch.testing.assert_close(ours, rank_within_head(scores), rtol=0, atol=0, equal_nan=True)
