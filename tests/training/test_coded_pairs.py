"""Softly coded pairs: a choice that is certain leaves what a packed layer holds."""

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.codes.precision import MIXED, MIXED_TRANSFORMED
from kvpress_moe.training.coded_pairs import CodedPairs, layer_basis
from tests.codes.test_codes import basis_of, keys_like
from tests.tiny import tiny_model


@pytest.mark.parametrize("with_basis", [False, True])
def test_a_certain_choice_leaves_what_a_packed_layer_holds(with_basis):
    basis = basis_of(60)
    keys, values = keys_like(basis, 60), torch.randn(1, 2, 60, 64)
    menu = MIXED_TRANSFORMED if with_basis else MIXED
    used = basis if with_basis else None
    coded = CodedPairs.of(keys, values, menu, 0.125, torch.ones(2) * 64, used)
    strategies = torch.randint(0, len(menu) + 1, (1, 2, 60), generator=torch.Generator().manual_seed(0))
    packed = PackedLayer.from_strategies(keys, values, strategies, menu, used)
    expected_keys, expected_values = (torch.cat(list(part)) for part in zip(*packed.heads()[0], strict=True))
    log_probs = torch.full((len(menu) + 1, 2, 60), -torch.inf).scatter_(0, strategies, 0.0)
    log_probs[:, strategies[0] == 0] = 0.0  # evicted pairs: whatever is left of them, the mask hides it
    got_keys, got_values = coded.mixed(keys, values, log_probs, menu)
    kept = strategies[0] > 0

    def by_strategy(pairs):  # a packed layer joins pairs of one strategy
        rows = [pairs[0, h][strategies[0, h] == m] for h in range(2) for m in range(1, len(menu) + 1)]
        return torch.cat(rows)

    assert len(by_strategy(got_keys)) == int(kept.sum())
    assert_close(sorted_rows(by_strategy(got_keys)), sorted_rows(expected_keys), rtol=1e-3, atol=1e-3)
    assert_close(sorted_rows(by_strategy(got_values)), sorted_rows(expected_values), rtol=1e-3, atol=1e-3)


def sorted_rows(rows):
    return rows[rows[:, 0].argsort()]


def test_the_gradient_of_a_choice_is_what_its_code_adds():
    basis = basis_of(20)
    keys, values = keys_like(basis, 20), torch.randn(1, 2, 20, 64)
    coded = CodedPairs.of(keys, values, MIXED_TRANSFORMED, 0.125, torch.ones(2), basis)
    log_probs = torch.zeros(len(MIXED_TRANSFORMED) + 1, 2, 20, requires_grad=True)
    wanted = torch.randn(1, 2, 20, 64)
    mixed, _ = coded.mixed(keys, values, log_probs, MIXED_TRANSFORMED)
    (mixed * wanted).sum().backward()
    gain = torch.stack(
        [
            (coded.keys[p.key_bits] * wanted[0]).sum(-1) if p.key_bits in coded.keys else torch.zeros(2, 20)
            for p in MIXED_TRANSFORMED
        ]
    )
    expected = (gain - gain.mean(0)) / len(MIXED_TRANSFORMED)
    assert_close(log_probs.grad[1:], expected, rtol=1e-3, atol=1e-4)
    assert (log_probs.grad[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_keep_their_type(dtype):
    basis = basis_of(20)
    keys, values = keys_like(basis, 20).to(dtype), torch.randn(1, 2, 20, 64, dtype=dtype)
    coded = CodedPairs.of(keys, values, MIXED_TRANSFORMED, 0.125, torch.ones(2), basis)
    log_probs = torch.zeros(len(MIXED_TRANSFORMED) + 1, 2, 20, requires_grad=True)
    for mixed in coded.mixed(keys, values, log_probs, MIXED_TRANSFORMED):
        assert mixed.dtype == dtype
        assert mixed.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_transforms_there_is_no_basis(family):
    assert layer_basis(tiny_model(family), 0, None, 30) is None
