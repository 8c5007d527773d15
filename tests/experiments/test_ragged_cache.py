"""The benchmark of ragged caches measures every way on one prompt; a way that fails says why and stops nothing."""

import pytest
import torch

from experiments.ragged_cache import ATTENTIONS, measure, printed, rows_of
from kvpress_moe.benchmark.random_models import small_llama
from kvpress_moe.cache import attention_dispatch
from kvpress_moe.cache.torch_backend import torch_attention
from tests.tiny import tokens


@pytest.fixture(scope="module")
def ways():
    return measure(small_llama(200, num_layers=2, num_heads=8), tokens(200), 2, 2, ["torch", "flash"])


def test_bytes_are_counted_and_ragged_ones_are_those_of_the_uniform_cache(ways):
    rows = {row["cache"]: row for row in rows_of("tiny", 200, ways) if "failed" not in row}
    packed = {name for name in rows if name.startswith("packed")}
    assert packed >= {"packed, K8V4", "packed, K4V4", "packed, mixed"}
    assert set(rows) - packed == {"full", "uniform", "ragged, layer, torch", "ragged, global, torch", "AdaKV, masked"}
    pair = 2 * 64 * 4
    for name in packed:  # a quarter of a 16-bit cache
        assert rows[name]["share_of_full_bytes"] <= 0.125
    assert rows["full"]["mib"] * 2**20 == 2 * 2 * 200 * pair
    for name in ("uniform", "ragged, layer, torch", "ragged, global, torch"):
        assert rows[name]["share_of_full_bytes"] == 0.25
    assert rows["AdaKV, masked"]["share_of_full_bytes"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn's call works there")
def test_a_way_that_fails_says_why_and_the_others_are_measured(ways):
    rows = {row["cache"]: row for row in rows_of("tiny", 200, ways)}
    for budget in ("layer", "global"):
        assert "Could not run" in rows[f"ragged, {budget}, flash"]["failed"]
        assert "failed: NotImplementedError" in printed(rows[f"ragged, {budget}, flash"])
        assert len(ways[f"ragged, {budget}, torch"].seconds) == 2


def test_a_way_that_computes_something_else_shows(llama, monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "flex", lambda *args: torch_attention(*args) * 1.1)
    ways = measure(llama, tokens(200), rounds=1, n_new=1, attentions=["torch", "flex"])
    assert ways["ragged, global, torch"].difference == 0
    assert ways["ragged, global, flex"].difference > 1e-3


def test_caches_are_as_long_as_before_and_the_choice_of_attention_is_taken_back(ways):
    assert {way.cache.get_seq_length() for way in ways.values()} == {200}
    assert ways["uniform"].cache.layers[0].keys.shape[2] == 50
    assert attention_dispatch._in_use is torch_attention
