"""Budget, eviction, feedback and selection: each stage against a naive loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept

from kvpress_moe.budget.allocation import least_pairs, mixed_keep_fraction, pairs_kept, share
from kvpress_moe.budget.eviction import evict, kept_mask, select
from kvpress_moe.budget.hit_rates import mass_by_expert, pairs_by_expert
from kvpress_moe.errors import ExpertError
from kvpress_moe.experts.custom import score_selection
from tests import reference


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 2**31))
def test_the_best_pairs_stay_in_their_original_order_and_of_equals_the_first(n_tokens, ratio, seed):
    scores = torch.randn(2, 3, n_tokens, generator=torch.Generator().manual_seed(seed)).mul(4).round()
    n_kept = compute_n_kept(n_tokens, ratio)
    indices = select(scores, n_kept)
    for head, kept in zip(scores.flatten(0, 1), indices.flatten(0, 1), strict=True):
        best = sorted(range(n_tokens), key=lambda s: -head[s].item())[:n_kept]
        assert kept.tolist() == sorted(best)
    states = torch.arange(n_tokens).float()[None, None, :, None].expand(2, 3, -1, 4)
    assert torch.equal(evict(states, indices)[..., 0], indices.float())
    assert kept_mask(indices, n_tokens).sum(-1).unique().tolist() == [n_kept]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 2**31))
def test_of_equal_scores_the_first_ones_stay(n_tokens, n_values, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, torch.inf])[-n_values:]
    scores = levels[torch.randint(0, n_values, (2, 3, n_tokens), generator=generator)]
    n_kept = compute_n_kept(n_tokens, ratio)
    for head, kept in zip(scores.flatten(0, 1), select(scores, n_kept).flatten(0, 1), strict=True):
        first = sorted(range(n_tokens), key=lambda s: -head[s].item())[:n_kept]  # Python's sort is stable
        assert kept.tolist() == sorted(first)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 2**31))
def test_units_share_as_a_naive_loop_says_and_of_equals_the_first_stays(n_units, n_tokens, ratio, min_share, seed):
    scores = torch.randn(2, n_units, n_tokens, generator=torch.Generator().manual_seed(seed)).mul(4).round()
    n_kept = compute_n_kept(n_tokens, ratio)
    for row, kept in zip(scores, share(scores, n_kept, least_pairs(n_kept, min_share)), strict=True):
        assert kept.nonzero().tolist() == reference.shared(row, n_kept, min_share)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_masses_by_expert_equal_a_naive_loop(n_tokens, num_experts, per_head, seed):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, n_tokens, generator=generator)
    routed = torch.rand(2, 3 if per_head else 1, n_tokens, num_experts, generator=generator) > 0.5
    expected = reference.mass_by_expert(mass, routed)
    assert mass_by_expert(mass, routed).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    pairs = mass > 0.5
    assert pairs_by_expert(pairs, routed).tolist() == reference.mass_by_expert(pairs.float(), routed)


def test_own_keep_fractions_are_weighted_by_usage():
    assert mixed_keep_fraction([3, 1], [0.2, 0.6]) == pytest.approx(0.3)
    assert pairs_kept(100, 0.3) == 30
    assert pairs_kept(3, 0.01) == 1
    assert pairs_kept(3, 1.0) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_returned_selection_is_recognised_exactly(dtype):
    keys = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    indices = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:7] for i in range(6)])
    indices = indices.view(2, 3, 7)
    scores = score_selection(evict(keys, indices), keys, "mine")
    assert torch.equal(scores.bool(), kept_mask(indices, 20))


def test_a_returned_key_that_was_not_given_is_an_error():
    keys = torch.randn(1, 1, 5, 4)
    with pytest.raises(ExpertError, match="mine"):
        score_selection(keys[:, :, :2] * 1.001, keys, "mine")


def test_every_unit_keeps_its_floor_though_others_score_infinity_beyond_the_budget():
    scores = torch.zeros(1, 3, 10)
    scores[:, 0] = torch.inf
    scores[:, 1, 3] = torch.inf
    assert share(scores, 4, 2).sum(-1).tolist() == [[8, 2, 2]]


@pytest.mark.parametrize(
    ("n_kept", "min_share", "floor"),
    [
        (512, 0.2, 102),  # a fifth
        (200, 0.2, 40),
        (150, 0.2, 40),  # a fifth is 30
        (100, 0.2, 40),  # twice a fifth
        (50, 0.2, 20),
        (3, 0.2, 1),
        (10, 1.0, 10),  # never more than the mean
        (100, 0.0, 1),
    ],
)
def test_where_a_share_of_the_mean_is_few_pairs_a_head_keeps_up_to_twice_as_many(n_kept, min_share, floor):
    assert least_pairs(n_kept, min_share) == floor
    assert least_pairs(n_kept, min_share, min_pairs=0) == max(1, int(n_kept * min_share))
