"""Plots draw what they were given: arrays, labels and intervals are compared with the input; bad input is refused."""

import importlib
import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from kvpress_moe import MoERouterPress, SettingError, plots
from kvpress_moe.benchmark.results import load, mean_over_tasks
from kvpress_moe.cache import kept_pairs
from kvpress_moe.cache.prefill import Prefill
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.routers.checkpoint import save_routers
from tests.report.test_benchmark_report import RATIOS, TASKS, write_run
from tests.tiny import tokens

NAMES = ["keydiff", "tova", "expected_attention"]


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def grid(figure):
    return figure.axes[0].images[0].get_array()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture(scope="module")
def judged(llama):
    """A press that has judged one prompt, and the pairs it kept."""
    press = MoERouterPress(0.6, experts=NAMES, top_k=2)
    prefill = Prefill(llama, tokens(50))
    return press, kept_pairs(prefill.cache, prefill.compress(press))


def of_layers(stats, part, name):
    return np.array([layer[part][name] for layer in stats["layer_stats"].values()])


@pytest.mark.parametrize(
    ("plot", "part", "name"),
    [
        (plots.expert_usage, "router_stats", "expert_usage_ratios"),
        (plots.hit_rates, "expert_compression_stats", "cache_hit_rates"),
    ],
)
def test_a_heat_map_of_experts_holds_the_statistics(judged, plot, part, name):
    press, _ = judged
    figure = plot(press.get_stats(), press.expert_strategies)
    assert isinstance(figure, Figure)
    axis = figure.axes[0]
    expected = of_layers(press.get_stats(), part, name)
    np.testing.assert_array_equal(grid(figure), expected)
    assert labels(axis.get_xticklabels()) == NAMES
    assert labels(axis.get_yticklabels()) == ["0", "1"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("expert", "layer")
    assert texts(figure) == [f"{value:.2f}" for value in expected.flat]
    assert labels(plot(press.get_stats()).axes[0].get_xticklabels()) == ["0", "1", "2"]


def test_what_was_not_counted_is_grey_and_a_dash():
    layer = {"expert_compression_stats": {"cache_hit_rates": [0.25, float("nan")]}}
    figure = plots.hit_rates({"layer_stats": {3: layer}})
    assert grid(figure).mask.tolist() == [[False, True]]
    assert texts(figure) == ["0.25", "–"]
    assert labels(figure.axes[0].get_yticklabels()) == ["3"]


def test_many_layers_are_numbered_where_there_is_room():
    layers = {i: {"router_stats": {"expert_usage_ratios": [0.5, 0.5]}} for i in range(2, 42)}
    axis = plots.expert_usage({"layer_stats": layers}).axes[0]
    assert axis.get_yticks().tolist() == list(range(0, 40, 3))
    assert labels(axis.get_yticklabels()) == [str(i + 2) for i in range(0, 40, 3)]


def test_kept_positions_are_shares_of_stretches_of_the_text(judged):
    _, kept = judged
    figure = plots.kept_positions(kept, bins=7)  # 50 tokens in stretches of 7 or 8
    edges = np.linspace(0, 50, 8).round().astype(int)
    for row, mask in enumerate(kept.values()):
        expected = [mask[..., a:b].float().mean().item() for a, b in pairwise(edges)]
        np.testing.assert_allclose(grid(figure)[row], expected)
    assert figure.axes[0].images[0].get_extent() == [0, 50, 1.5, -0.5]
    by_token = plots.kept_positions(kept)  # fewer tokens than stretches: one each
    np.testing.assert_allclose(grid(by_token)[1], kept[1].float().mean((0, 1)))


def test_kept_share_is_each_heads(judged):
    _, kept = judged
    figure = plots.kept_share({4: kept[0], 6: torch.cat((kept[1][..., :25], ~kept[1][..., :25]), dim=-1)})
    np.testing.assert_allclose(grid(figure), [[0.4, 0.4], [0.5, 0.5]])
    assert labels(figure.axes[0].get_yticklabels()) == ["4", "6"]
    assert labels(figure.axes[0].get_xticklabels()) == ["0", "1"]


@pytest.mark.parametrize("metric", ["kl", "score", "extra"])
def test_curves_over_the_ratio_are_means_with_their_intervals(tmp_path, metric):
    run = write_run(tmp_path / "run")
    results = load([run])
    figure = plots.over_ratio(run, metric, ["cur", "<b>moe</b>"])
    axis = figure.axes[0]
    assert axis.get_yscale() == ("log" if metric == "kl" else "linear")
    assert labels(axis.get_xticklabels()) == ["50%", "75%", "90%"]
    assert labels(figure.legends[0].get_texts()) == (["full cache"] if metric == "score" else []) + [
        "cur",
        "<b>moe</b>",
    ]
    for container, method in zip(axis.containers, ("cur", "<b>moe</b>"), strict=True):
        estimates = [mean_over_tasks(results.by_task((method, ratio), metric)) for ratio in RATIOS]
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_ydata(), [e.mean for e in estimates])
        np.testing.assert_allclose(line.get_xdata(), RATIOS, atol=0.01)
        np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [(e.low, e.high) for e in estimates])
    grey = [line for line in axis.lines if line.get_color() == "#cccccc"]
    means = [[mean_over_tasks(results.by_task((m, r), metric)).mean for r in RATIOS] for m in ("random", "snapkv")]
    np.testing.assert_allclose([line.get_ydata() for line in grey], means)
    dashed = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([2 / 3] if metric == "score" else [])


def test_a_panel_for_each_task(tmp_path):
    run = write_run(tmp_path / "run")
    figure = plots.over_ratio([run], by_task=True)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == list(TASKS)
    results = load([run])
    for axis, task in zip(shown, TASKS, strict=True):
        line = axis.containers[0].lines[0]  # ours, in front
        expected = [results.by_task(("<b>moe</b>", ratio), "kl")[task].mean() for ratio in RATIOS]
        np.testing.assert_allclose(line.get_ydata(), expected)


def test_training_curves_and_losses_of_layers(tmp_path):
    log = {"loss_by_epoch": [[3.0, 2.0, 1.0], [5.0, 4.0, 2.0]], "loss_by_layer": [1.0, 2.0]}
    *curves, mean = plots.training_curves(log).axes[0].lines
    assert [curve.get_ydata().tolist() for curve in curves] == log["loss_by_epoch"]
    assert mean.get_ydata().tolist() == [4.0, 3.0, 1.5]
    assert mean.get_xdata().tolist() == [1, 2, 3]
    config = RouterConfig("base", ("keydiff", "cur"), num_layers=2, hidden_size=8)
    save_routers(Routers(config, {}), tmp_path, log)
    axis = plots.loss_by_layer(tmp_path).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [1.0, 2.0]
    assert len(plots.training_curves(tmp_path).axes[0].lines) == 3


def test_bad_input_is_refused_by_the_field(judged, tmp_path):
    press, kept = judged
    run = write_run(tmp_path / "run")
    (tmp_path / "routers.json").write_text(json.dumps({"metrics": {"loss_by_layer": [1.0]}}))
    for call, message in [
        (lambda: plots.expert_usage(MoERouterPress().get_stats()), "stats: got {}, expected counts of at least one"),
        (lambda: plots.expert_usage([1, 2]), "stats: got 'list', expected what press.get_stats"),
        (lambda: plots.hit_rates({}), "stats: got 'dict'"),
        (lambda: plots.hit_rates(press.get_stats(), ["a", "b"]), "names: got .* one name for each of the 3 experts"),
        (lambda: plots.hit_rates(press.get_stats(), "abc"), "names: got 'abc'"),
        (lambda: plots.kept_positions({}), "kept: got 'dict', expected a mapping of at least one layer"),
        (lambda: plots.kept_positions(kept[0]), "kept: got 'Tensor'"),
        (lambda: plots.kept_positions(kept, bins=0), "bins: got 0"),
        (lambda: plots.kept_share({0: kept[0][0]}), r"kept: got \(2, 50\), expected a tensor .* for layer 0"),
        (lambda: plots.kept_share({0: kept[0], 1: kept[1][..., 1:]}), "kept: got .* layers of the same shape"),
        (lambda: plots.over_ratio(tmp_path / "nowhere"), "RUN: got"),
        (lambda: plots.over_ratio(run, "bytes"), "metric: got 'bytes', expected one of kl, score"),
        (lambda: plots.over_ratio(run, methods=["nobody"]), "methods: got 'nobody', expected methods of the records"),
        (lambda: plots.over_ratio(run, methods=[]), "methods: got .* one to 7"),
        (lambda: plots.training_curves({}), "log: got .* metrics with loss_by_epoch"),
        (lambda: plots.training_curves(tmp_path), "log: got .* metrics with loss_by_epoch. loss_by_layer draws"),
        (lambda: plots.loss_by_layer(tmp_path / "nowhere"), "log: got .* a directory of saved routers"),
    ]:
        with pytest.raises(SettingError, match=f"^{message}"):
            call()


def test_pyplot_is_not_even_imported(monkeypatch):
    """No window system is looked for, and no figure stays in memory."""
    monkeypatch.setattr("kvpress_moe.plots", plots)  # what the fresh import replaces comes back afterwards
    for name in [name for name in sys.modules if name.startswith("kvpress_moe.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    fresh = importlib.import_module("kvpress_moe.plots")
    fresh.loss_by_layer({"loss_by_layer": [1.0]})
