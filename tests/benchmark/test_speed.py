"""What `bench speed` measures is what it says: the same work with and without a press, in turns."""

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from kvpress_moe.benchmark.random_models import llama_8b
from kvpress_moe.benchmark.speed import (
    KVZIP,
    NONE,
    OURS,
    ROUTING,
    THEIRS,
    TRAINED,
    Row,
    SpeedPlan,
    decode,
    measure,
    peak_bytes,
)
from kvpress_moe.cli import app
from kvpress_moe.errors import SettingError
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.report.speed_report import growth, markdown
from tests.tiny import decoder, prefill, tokens

PLAN = SpeedPlan(lengths=(128, 192), batches=(1, 2), rounds=2, new_tokens=3)


@pytest.fixture(scope="module")
def rows(llama, chat_tokenizer):
    return measure(llama, chat_tokenizer, PLAN)


def test_every_press_is_measured_beside_no_press_at_every_setting(rows):
    for tokens_, batch in ((128, 1), (128, 2), (192, 1), (192, 2)):
        of_setting = [row for row in rows if (row.tokens, row.batch) == (tokens_, batch)]
        prefills = {row.name: row for row in of_setting if row.what == "prefill"}
        assert set(prefills) >= {NONE, "MoERouter (guide)", "SnapKV", "CriticalAdaKV(SnapKV)"}
        assert (KVZIP in prefills) == (batch == 1)
        assert prefills[NONE].ratio == 1.0
        for row in prefills.values():
            assert row.fastest <= row.seconds <= row.slowest
            assert row.ratio == row.seconds / prefills[NONE].seconds
        decoded = {row.name: row.extra_peak_bytes for row in of_setting if row.what == "decode"}
        assert decoded["50 %"] == decoded["full"] / 2
        assert decoded["25 %"] == decoded["full"] / 4


def test_nothing_is_left_on_the_model(llama, rows):
    for layer in decoder(llama).layers:
        assert getattr(layer.self_attn, "masked_key_indices", None) is None
        assert not layer.self_attn._forward_hooks


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_decoding_leaves_the_cache_as_it_was(llama, budget):
    press = MoERouterPress(0.5, experts=["expected_attention"], budget=budget)
    cache = prefill(llama, tokens(60), press)
    with torch.no_grad():
        before = llama(tokens(1), past_key_values=cache, position_ids=torch.tensor([[60]])).logits
        cache.crop(-1)
        decode(llama, cache, tokens(60), 4)
        after = llama(tokens(1), past_key_values=cache, position_ids=torch.tensor([[60]])).logits
    assert torch.equal(before, after)


def test_the_model_for_gpus_has_the_shape_of_llama_3_1_8b():
    model = llama_8b(131_072, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248  # as its card says
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    config = model.config
    pair = 2 * config.head_dim * config.num_key_value_heads * config.num_hidden_layers * 2
    assert pair == 128 * 1024  # bytes of a token's keys and values


def test_the_peak_is_that_of_the_work_alone():
    device, held = torch.device("cpu"), torch.ones(2**22)

    def work():
        total = held + 1  # 16 MiB
        total = total + torch.ones(2**20)[:1]  # 16 more and 4
        return total.sum()

    assert peak_bytes(device, work) == pytest.approx(2**20 * 36, rel=0.01)
    assert peak_bytes(device, lambda: torch.ones(2**20)) == pytest.approx(2**22, rel=0.01)


def test_growth_is_the_slope_between_doubled_lengths():
    def row(name, tokens_, in_press):
        return Row("prefill", name, tokens_, 1, 2.0, 2.0, 2.0, 1.0, 3 * tokens_, in_press)

    made = [row("linear", n, n / 10_000) for n in (1000, 2000, 4000)]
    made += [row("square", n, n**2 / 10_000_000) for n in (1000, 2000, 4000)]
    assert growth(made, "linear") == {"seconds": pytest.approx((1.0, 1.0)), "bytes": pytest.approx((1.0, 1.0))}
    assert growth(made, "square")["seconds"] == pytest.approx((2.0, 1.0))
    assert growth(made[:2], "linear") == {}
    assert set(growth([row("on a GPU", n, None) for n in (1000, 2000, 4000)], "on a GPU")) == {"bytes"}


def test_time_inside_a_press_is_part_of_its_prefill(rows):
    for row in rows:
        if row.what == "prefill" and row.name in OURS | THEIRS:
            assert 0 < row.in_press < row.slowest


def test_the_share_of_routers_and_gates_stands_beside_the_trained_press(llama, monkeypatch):
    monkeypatch.setattr("kvpress_moe.benchmark.speed.shipped_routers", lambda attention: object())
    trained = partial(MoERouterPress, experts=["expected_attention", "knorm"])
    rows = measure(llama, None, SpeedPlan(lengths=(128,), rounds=2, new_tokens=1), {TRAINED: trained})
    whole, routing = (next(row for row in rows if row.name == name) for name in (TRAINED, ROUTING))
    assert 0 < routing.seconds < whole.in_press
    assert f"| {ROUTING} |" in markdown(rows)


def test_the_trained_press_is_left_out_where_no_routers_ship(rows):
    assert TRAINED not in {row.name for row in rows}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lengths": (8,)}, "lengths"),
        ({"batches": (0,)}, "batches"),
        ({"ratio": 1.0}, "ratio"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_bad_plans_are_refused(change, field):
    with pytest.raises(SettingError, match=f"^{field}: got"):
        SpeedPlan(**change).check()


def test_prompts_longer_than_the_model_reads_are_refused(llama):
    with pytest.raises(SettingError, match="^lengths: got"):
        measure(llama, None, SpeedPlan(lengths=(10**6,), longest=10**9))


def test_the_command_writes_table_figures_and_plot(model_directory, tmp_path):
    command = ["bench", "speed", "--model", str(model_directory), "--lengths", "128,160", "--rounds", "1"]
    command += ["--new-tokens", "2", "--presses", "SnapKV,KeyDiff", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert {row["name"] for row in figures["rows"] if row["what"] == "prefill"} == {NONE, "SnapKV", "KeyDiff", KVZIP}
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "SnapKV, 160×1" in json.loads(result.stdout.splitlines()[-1])["prefill"]
    assert "| SnapKV |" in (tmp_path / "speed.md").read_text()
