"""Byte budgets in the benchmark: equal for all methods, counted as in a 16-bit cache, and kept as the press keeps."""

import json
from dataclasses import replace

import pytest
import torch

import kvpress_moe.benchmark.byte_strategies as byte_strategies
import kvpress_moe.benchmark.shared_prefill as shared_prefill
from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.byte_strategies import Coded, LossTaker, decode_all
from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.benchmark.methods import Method, find_methods
from kvpress_moe.benchmark.multi_pass import select_in_own_prefill
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.quantised_caches import QUANTISED, kivi
from kvpress_moe.benchmark.records import read_records
from kvpress_moe.benchmark.results import load
from kvpress_moe.benchmark.runner import run
from kvpress_moe.benchmark.shared_prefill import select_pairs
from kvpress_moe.codes.precision import Precision
from kvpress_moe.errors import SettingError
from kvpress_moe.press.packing import Menu
from kvpress_moe.report.benchmark_report import write_report
from kvpress_moe.routers.checkpoint import save_routers
from tests.tiny import calibrated_routers, prefill, tiny_model, tokens

PLAN = Plan(tasks=("kv_list", "prose"), ratios=(0.8, 0.9), lengths=(600,), limit=1, min_share=0.2, by_bytes=True)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", head_dim=32)


def mixed(model, **settings) -> Method:
    """``moe_mixed`` with calibrated routers of a tiny model."""
    routers = calibrated_routers(model)
    make = lambda protect: MoERouterPress(precision="mixed", router=routers, cache_aware=False)  # noqa: E731
    return Method("mine", "ours", make, "global", "mine", precision="own", **settings)


def test_the_benchmark_keeps_what_the_press_keeps(llama, monkeypatch):
    monkeypatch.setattr(byte_strategies, "ELEMENT_SIZE", 4)  # the tiny model's own type
    method, input_ids = mixed(llama), tokens(180)
    for ratio in (0.6, 0.9):
        selections = select_pairs(llama, input_ids, {"mine": method}, [("mine", ratio)], 0, 0)
        press = method.make(lambda scorer: scorer)
        press.compression_ratio = ratio
        cache = prefill(llama, input_ids, press)
        kept = selections.kept["mine", ratio]
        for number, layer in enumerate(cache.layers):
            dense = selections.cache.layers[number]
            ((keys, values),) = decode_all([kept.coded], number, dense.keys, dense.values)
            for head, (key, value) in enumerate(layer.heads()[0]):  # the layer holds them by precision
                mask = kept.mask[number][head]
                ours = torch.cat((keys[head][mask], values[head][mask]), dim=-1)
                assert sorted(ours.tolist()) == sorted(torch.cat((key, value), dim=-1).tolist())


def test_caches_with_different_menus_are_decoded_as_each_alone(llama):
    """Several caches are coded together; pairs must not take the precision of another cache's menu."""
    layer = prefill(llama, tokens(60)).layers[0]
    menus = [Menu.of([Precision(*bits) for bits in menu], 8, 2, None) for menu in ([(8, 8), (2, 2)], [(4, 4)])]
    generator = torch.Generator().manual_seed(0)
    coded = [
        Coded([torch.randint(0, len(menu.nbytes), (2, 60), generator=generator).byte()], menu, [None])
        for menu in (*menus, menus[0])
    ]
    together = decode_all(coded, 0, layer.keys, layer.values)
    for one, found in zip(coded, together, strict=True):
        (alone,) = decode_all([one], 0, layer.keys, layer.values)
        mask = one.strategies[0] > 0
        assert all(torch.equal(a[mask], b[mask]) for a, b in zip(found, alone, strict=True))
    assert not torch.equal(together[0][0], together[2][0])


def test_a_press_of_ones_own_with_a_precision_is_judged_by_its_own_rule(llama, tmp_path):
    save_routers(calibrated_routers(llama), tmp_path)
    spec = f"own=kvpress_moe:MoERouterPress(router={str(tmp_path)!r}, precision='mixed', cache_aware=False)"
    (own,) = find_methods([spec]).values()
    cells, input_ids = [("own", 0.8), ("mine", 0.8)], tokens(180)
    kept = select_pairs(llama, input_ids, {"own": own, "mine": mixed(llama)}, cells, 4, 16).kept
    for ours, theirs in zip(*(kept[cell].coded.strategies for cell in cells), strict=True):
        assert torch.equal(ours, theirs)
    unaware = replace(mixed(llama), name="own", budget="uniform")  # named before the press has seen the model
    again = select_pairs(llama, input_ids, {"own": unaware}, cells[:1], 4, 16).kept["own", 0.8].coded.strategies
    assert all(torch.equal(*both) for both in zip(again, kept["mine", 0.8].coded.strategies, strict=True))
    with pytest.raises(SettingError, match="methods: got"):  # its bytes are no share of the pairs
        replace(PLAN, methods=(spec,), by_bytes=False).check()


def test_no_method_takes_more_than_its_share_of_a_16_bit_cache(llama, chat_tokenizer):
    names = (
        "knorm",
        "knorm+k8v4",
        "keydiff_global+k4v2",
        "rdkv",
        "kvzip_global+k4v4",
        "kvzip_global+mixed",
        "kivi_4",
        "kivi_2",
    )
    evaluator = Evaluator(replace(PLAN, methods=names), (llama, chat_tokenizer))
    evaluator.methods["mine"] = mixed(llama)
    full, *rows = evaluator.evaluate(evaluator.samples[0], evaluator.cells())["results"]
    assert full[7] == full[6] * 2 * 32 * 2
    for name, ratio, *figures in rows:
        share = figures[5] / full[7]
        if name.startswith("kivi"):
            assert 1 - ratio <= share < 1 - ratio + 20 / 300  # the protected tokens stay whole
        else:
            assert 0.9 * (1 - ratio) - 0.01 < share <= 1 - ratio + 1e-9, name


def test_first_and_last_tokens_are_never_evicted(llama):
    kept = select_pairs(llama, tokens(150), {"mine": mixed(llama)}, [("mine", 0.95)], 4, 16).kept["mine", 0.95]
    for mask in kept.mask:
        assert mask[:, :4].all()
        assert mask[:, -16:].all()


def test_names_say_how_pairs_are_coded():
    (method,) = find_methods(["snapkv_global+k8v4"]).values()
    assert (str(method.precision), method.group, method.budget) == ("K8V4", "bytes", "global")
    (method,) = find_methods(["kvzip_layer+mixed"]).values()
    assert (method.precision, method.group, method.budget) == ("weighed", "bytes", "layer")
    with pytest.raises(SettingError, match=r"for example kvzip_global\+mixed"):
        find_methods(["keydiff_global+mixed"])
    for wrong in (
        "moe_mixed+mixed",
        "snapkv+k7v4",
        "adakv_snapkv+k8v4",
        "nothing+k8v4",
        "rdkv+k8v4",
    ):
        with pytest.raises(SettingError):
            find_methods([wrong])


def test_weights_from_another_pass_give_the_strategies_of_a_press_with_these_weights(llama, monkeypatch):
    """A calibrated router without a rule weighs a pair by ``exp(score)``. Here KVzip's scores are these weights."""
    routers = calibrated_routers(llama)
    for layer in routers.layers:
        layer.rule = None
    press = MoERouterPress(precision="mixed", router=routers, cache_aware=False)
    mix, scores = press.mix, []
    monkeypatch.setattr(press, "mix", lambda *arguments: scores.append(mix(*arguments)[0]) or scores[-1][None])
    monkeypatch.setattr(shared_prefill, "LossTaker", lambda _: LossTaker(press))
    (zipped,) = find_methods(["kvzip_global+mixed"]).values()
    methods = {"mine": replace(mixed(llama), make=lambda protect: press), "zipped": zipped}
    cells = [(name, ratio) for ratio in (0.7, 0.9) for name in methods]
    prompt = Prompt(tokens(180), tokens(4), tokens(2))
    selections = select_pairs(llama, prompt.context, methods, cells, 4, 16)
    monkeypatch.setattr(ReplayScores, "of", lambda *_: torch.stack(scores).float().exp().square())
    select_in_own_prefill(llama, None, prompt, selections, methods, cells, 4, 16)
    for ratio in (0.7, 0.9):
        ours, theirs = (torch.stack(selections.kept[name, ratio].coded.strategies) for name in methods)
        assert (ours == theirs).float().mean() > 0.99  # exp and log are not exact


def naive_kivi(keys, values, bits):
    """By loops: keys by channel in groups of 32 tokens, values by token in groups of 32 channels."""
    keys, values = keys.clone(), values.clone()

    def code(numbers):
        low, high = min(numbers), max(numbers)
        step = (high - low) / (2**bits - 1)
        return [round((x - low) / step) * step + low for x in numbers]

    for head in range(keys.shape[1]):
        for channel in range(keys.shape[3]):
            for start in range(0, keys.shape[2] // 32 * 32, 32):
                keys[0, head, start : start + 32, channel] = torch.tensor(
                    code(keys[0, head, start : start + 32, channel].tolist())
                )
        for token in range(keys.shape[2]):
            values[0, head, token] = torch.tensor(code(values[0, head, token].tolist()))
    return keys, values


def test_kivi_is_what_its_recipe_says():
    keys, values = torch.randn(2, 1, 2, 70, 32)
    for ours, theirs in zip(kivi(3, keys, values), naive_kivi(keys, values, 3), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in QUANTISED if not name.startswith("kivi")])
@pytest.mark.parametrize(("n_heads", "n_tokens", "head_dim"), [(2, 64, 64), (3, 67, 64), (1, 6, 96), (1, 1, 96)])
def test_quantised_caches_of_transformers_lose_what_their_bits_allow(name, n_heads, n_tokens, head_dim):
    """HQQ packs numbers of different groups into a byte; tokens that do not fill one stay as they are."""
    pytest.importorskip("optimum.quanto" if name.startswith("quanto") else "hqq")
    if name.startswith("quanto") and n_tokens * n_heads * head_dim % 64:
        pytest.skip("quanto needs whole groups")
    states = torch.randn(2, 1, n_heads, n_tokens, head_dim)
    keys, values = QUANTISED[name][1]()(*states)
    error = (keys - states[0]).square().mean()
    assert 0 <= error < {"1": 4, "2": 0.3, "4": 0.02, "8": 1e-4}[name[-1]]
    assert error > 0 or n_tokens < 64
    assert values.shape == keys.shape


def test_a_run_by_bytes_is_reported_by_bytes(llama, chat_tokenizer, tmp_path):
    plan = replace(PLAN, methods=("knorm", "knorm+k8v4", "kivi_4"))
    run(plan, tmp_path, "bench", Evaluator(plan, (llama, chat_tokenizer)))
    results = load([tmp_path])
    assert results.ratios == [0.8, 0.9]
    assert list(results.fixed) == ["kivi_4"]
    assert len(list(read_records(tmp_path))) == 2
    written = [path.name for path in write_report([tmp_path], tmp_path / "report")]
    assert "kl_over_bytes.png" in written
    text = (tmp_path / "report" / "report.md").read_text()
    assert "0.2 of the bytes" in text
    assert "## Quantised caches" in text
    assert "share of bytes removed" in text
    assert "pairs evicted" not in text
    assert "nan" not in text.split("## Task score")[0]
    assert json.loads((tmp_path / "run.json").read_text())["by_bytes"] is True


def test_ratios_are_shares_of_pairs_so_codes_are_refused_with_them_and_left_out_by_default(llama, chat_tokenizer):
    plan = replace(PLAN, by_bytes=False, methods=("knorm", "moe_mixed"))
    with pytest.raises(SettingError, match="methods: got 'moe_mixed', expected methods whose pairs stay.*--bytes"):
        plan.check()
    evaluator = Evaluator(replace(plan, methods=None), (llama, chat_tokenizer))
    assert not any(method.precision for method in evaluator.methods.values())
    assert "moe_mixed" in Evaluator(replace(PLAN, methods=None), (llama, chat_tokenizer)).methods
