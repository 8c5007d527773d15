"""A run records every sample once, survives a kill, and refuses what would spoil it."""

import copy
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.methods import find_methods, registered
from kvpress_moe.benchmark.metrics import f1
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.benchmark.records import COLUMNS, Records, read_records, rounded
from kvpress_moe.benchmark.runner import header, missing, run
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.errors import SettingError, UnsupportedModelError
from kvpress_moe.routers.checkpoint import save_routers
from tests.tiny import FAMILIES, calibrated_routers, tiny_model

PLAN = Plan(
    methods=("knorm", "adakv_snapkv", "moe_guide"),
    tasks=("needle_noise", "multi_value", "code"),
    ratios=(0.5, 0.9),
    lengths=(700,),
    limit=2,
)


@pytest.fixture(scope="module")
def evaluator(llama, chat_tokenizer):
    return Evaluator(PLAN, (llama, chat_tokenizer))


def lines(directory):
    return [{**record, "prefill_s": 0} for record in read_records(directory)]


def without_seconds(records):
    return [{**record, "results": [row[:-1] for row in record["results"]], "prefill_s": 0} for record in records]


def test_a_run_records_every_cell_of_every_sample_once_and_repeats_nothing(evaluator, tmp_path):
    summary = run(PLAN, tmp_path, "bench", evaluator)
    assert (summary["samples"], summary["earlier"]) == (6, 0)
    for record in lines(tmp_path):
        cells = [(row[0], row[1]) for row in record["results"]]
        assert cells == evaluator.cells()
        assert record["results"][0][:2] == ["full", 0.0]
        assert record["results"][0][4] == pytest.approx(0, abs=1e-6)
    again = run(PLAN, tmp_path, "bench", evaluator)
    assert (again["samples"], again["earlier"]) == (0, 6)
    assert len(lines(tmp_path)) == 6


def test_more_methods_and_ratios_are_added_to_the_same_samples(llama, chat_tokenizer, evaluator, tmp_path):
    run(PLAN, tmp_path, "first", evaluator)
    more = replace(PLAN, methods=("knorm", "keydiff"), ratios=(0.5, 0.75))
    summary = run(more, tmp_path, "second", Evaluator(more, (llama, chat_tokenizer)))
    assert summary["cells"] == 6 * 3  # knorm at .75, keydiff at both
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["commands"] == ["first", "second"]
    assert set(kept["methods"]) == {"full", "knorm", "adakv_snapkv", "moe_guide", "keydiff"}


def test_a_line_that_was_cut_short_is_done_again(evaluator, tmp_path):
    run(PLAN, tmp_path, "bench", evaluator)
    before = without_seconds(read_records(tmp_path))
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert run(PLAN, tmp_path, "bench", evaluator)["samples"] == 1
    assert without_seconds(read_records(tmp_path)) == before


def test_a_killed_run_goes_on_without_repeating_or_losing_a_sample(model_directory, chat_tokenizer, tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(model_directory), str(model)], check=True)
    chat_tokenizer.save_pretrained(model)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "kvpress_moe", "bench", "--model", str(model), "--out", str(out), "--limit", "30"]
    command += ["--methods", "knorm,snapkv", "--tasks", "needle_noise,kv_list", "--lengths", "700", "--ratios", "0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    records = out / "records.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (records.exists() and records.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [record["sample"] for record in read_records(out)]
    assert 3 <= len(done) < 60
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    summary = json.loads(finished.stdout.strip().splitlines()[-1])
    assert summary["earlier"] == len(done)
    samples = [record["sample"] for record in read_records(out)]
    assert samples[: len(done)] == done
    assert len(samples) == len(set(samples)) == 60


def test_a_run_of_another_seed_or_protection_is_refused(evaluator, tmp_path):
    run(PLAN, tmp_path, "bench", evaluator)
    before = (tmp_path / "records.jsonl").read_bytes()
    for change in ({"seed": 1}, {"sinks": 0}, {"setting": "aware"}):
        with pytest.raises(SettingError, match=f"^out: got .* {next(iter(change))} was"):
            run(replace(PLAN, **change), tmp_path, "bench", evaluator)
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_press_of_ones_own_has_its_own_budget_and_the_runs_min_share(llama, chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpress_moe.routers.active.shipped_routers", lambda attention: calibrated_routers(llama))
    save_routers(calibrated_routers(llama), tmp_path)
    budgets = {
        "": "global",  # the routers that ship
        "num_experts=4": "uniform",
        "budget='layer'": "layer",
        f"router='{tmp_path}'": "global",
        f"router='{tmp_path}', track_misses=True": "uniform",
    }
    names = tuple(f"mine{n}=kvpress_moe:MoERouterPress({given})" for n, given in enumerate(budgets))
    made = Evaluator(replace(PLAN, methods=names), (llama, chat_tokenizer)).methods
    assert [made[f"mine{n}"].budget for n in range(len(budgets))] == list(budgets.values())
    other = replace(PLAN, methods=("mine=kvpress_moe:MoERouterPress(min_share=0.4)",))
    with pytest.raises(
        SettingError, match=r"min_share: got 0.4, expected 0.2, the setting of the run, in the press mine"
    ):
        Evaluator(other, (llama, chat_tokenizer))
    assert Evaluator(replace(other, min_share=0.4), (llama, chat_tokenizer)).methods


def test_records_of_a_method_that_has_changed_are_not_continued(llama, chat_tokenizer, tmp_path):
    plan = replace(PLAN, methods=(f"mine=kvpress_moe:MoERouterPress(router='{tmp_path / 'routers'}')",))
    out = tmp_path / "run"
    for seed in (0, 1):
        save_routers(calibrated_routers(llama, seed=seed), tmp_path / "routers")
        own = Evaluator(plan, (llama, chat_tokenizer))
        if seed == 0:
            assert run(plan, out, "bench", own)["samples"] == 6
            assert run(plan, out, "bench", own)["samples"] == 0
            before = (out / "run.json").read_bytes()
        else:
            with pytest.raises(SettingError, match="out: .* mine has changed: its routers have other weights"):
                run(plan, out, "bench", own)
    assert (out / "run.json").read_bytes() == before
    with_kvzip = replace(plan, methods=("kvzip_global",))
    told = header(with_kvzip, Evaluator(with_kvzip, (llama, chat_tokenizer)), "bench")
    older = tmp_path / "older"
    older.mkdir()
    (older / "run.json").write_text(json.dumps(told | {"methods": {"kvzip_global": {"group": "multi-pass"}}}))
    with pytest.raises(SettingError, match="kvzip_global has changed: the beginning of the chat template"):
        Records(older, told)
    (older / "run.json").write_text(json.dumps({name: value for name, value in told.items() if name != "min_pairs"}))
    with pytest.raises(SettingError, match="min_pairs was None and is now 40"):
        Records(older, told)


def test_a_run_whose_records_were_gzipped_goes_on(evaluator, tmp_path):
    run(PLAN, tmp_path, "bench", evaluator)
    plain = tmp_path / "records.jsonl"
    lines = plain.read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:-1])))
    plain.unlink()
    assert run(PLAN, tmp_path, "bench", evaluator)["samples"] == 1
    assert plain.read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]
    assert not (tmp_path / "records.jsonl.gz").exists()


def test_a_full_disk_leaves_earlier_records_intact(evaluator, tmp_path, monkeypatch):
    records = Records(tmp_path, header(PLAN, evaluator, "bench"))
    records.add({"sample": "a", "results": []})
    before = records.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingError, match="No space left"):
        records.add({"sample": "b", "results": []})
    assert records.path.read_bytes() == before


def test_missing_work_is_what_no_record_holds(evaluator, tmp_path):
    records = Records(tmp_path, header(PLAN, evaluator, "bench"))
    sample = evaluator.samples[0]
    rest = [None] * (len(COLUMNS) - 2)
    about = {"sample": sample.id, "task": sample.task, "length": sample.length, "columns": list(COLUMNS)}
    records.add(about | {"results": [["full", 0.0, *rest], ["knorm", 0.9, *rest]]})
    work = missing(evaluator.cells(), evaluator.samples, records)
    assert len(work) == 6
    assert ("knorm", 0.9) not in work[0][1]
    assert ("knorm", 0.5) in work[0][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("snapvk",)}, "methods: got 'snapvk'.*Did you mean snapkv"),
        ({"methods": ("os:nothing",)}, "methods: got 'os:nothing'.*AttributeError"),
        ({"tasks": ("needles",)}, "tasks: got 'needles'"),
        ({"ratios": (1.0,)}, "ratios: got 1.0"),
        ({"setting": "blind"}, "setting: got 'blind'"),
        ({"lengths": (8,)}, "lengths: got 8"),
        ({"limit": 0}, "limit: got 0"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_loaded(change, message):
    with pytest.raises(SettingError, match=message):
        replace(PLAN, **change).check()


def test_contexts_longer_than_the_model_takes_and_models_that_presses_cannot_serve_are_refused(
    llama, chat_tokenizer, tmp_path
):
    long = replace(PLAN, lengths=(4096,), tasks=("kv_list",))
    with pytest.raises(SettingError, match="lengths: got 4096.*4096 tokens"):
        run(long, tmp_path / "long", "bench", Evaluator(long, (llama, chat_tokenizer)))
    assert not (tmp_path / "long").exists()
    turning = replace(PLAN, methods=("knorm", "rerotated_cur", "observed_attention"))
    with pytest.raises(SettingError, match=r"'observed_attention'\].*rerotated_cur turns keys.*Leave them out"):
        Evaluator(turning, (tiny_model("gemma3"), chat_tokenizer))
    for family in {"qwen3_moe", "olmoe"} & set(FAMILIES):
        with pytest.raises(UnsupportedModelError, match="whose norms of queries and keys kvpress does not know"):
            Evaluator(PLAN, (tiny_model(family), chat_tokenizer))


def test_a_model_with_windows_is_evaluated_by_all_methods_that_leave_them_alone(chat_tokenizer):
    """Nothing evicted is no divergence; ratios are met in the layers with full attention, which are all that counts."""
    plan = replace(PLAN, methods=None, ratios=(0.5,), tasks=("kv_list",), limit=1, sinks=0, recent=0)
    with pytest.warns(match="left out, .*pyramidkv shares a budget of all layers"):
        evaluator = Evaluator(plan, (tiny_model("gemma3"), chat_tokenizer))
    of_pairs = {name for name, method in find_methods(None).items() if method.precision is None}
    left_out = of_pairs - set(evaluator.methods)
    assert left_out == {"rerotated_cur", "rerotated_leverage", "pyramidkv"}
    sample = evaluator.samples[0]
    full, *rows = evaluator.evaluate(sample, evaluator.cells())["results"]
    whole = 2 * 2 * evaluator.prompt(sample).context.shape[1]
    assert (full[6], full[4]) == (whole, pytest.approx(0, abs=1e-6))
    for row in rows:
        assert 0.4 * whole < row[6] <= whole // 2, row[0]


def test_a_press_of_ones_own_takes_part(llama, chat_tokenizer, tmp_path):
    plan = replace(PLAN, methods=("knorm", "mine=kvpress:KnormPress()"), tasks=("kv_list",), limit=1)
    run(plan, tmp_path, "bench", Evaluator(plan, (llama, chat_tokenizer)))
    rows = {(row[0], row[1]): row[2:-1] for record in read_records(tmp_path) for row in record["results"]}
    assert rows["mine", 0.5] == rows["knorm", 0.5]


def test_every_registered_method_makes_a_press_that_takes_a_ratio():
    for name, method in registered().items():
        press = method.make(lambda scorer: scorer)
        if name != "full" and method.fixed_share is None:
            press.compression_ratio = 0.3
            assert press.compression_ratio == pytest.approx(0.3)
    assert find_methods(["knorm"]).keys() == {"knorm"}


def test_aware_compresses_the_question_too(chat_tokenizer):
    sample = make_sample("needle_noise", lambda text: len(text), 900, 0)
    agnostic, aware = (encode(sample, chat_tokenizer, setting) for setting in ("agnostic", "aware"))
    whole = [torch.cat((p.context, p.question, p.answer), 1) for p in (agnostic, aware)]
    assert torch.equal(*whole)
    assert aware.question.shape[1] == 1
    question = chat_tokenizer(sample.question).input_ids
    assert agnostic.question[0, 1 : len(question) + 1].tolist() == question


def test_a_model_without_a_template_reads_plain_text(tokenizer):
    sample = make_sample("needle_noise", lambda text: len(text), 900, 0)
    text = f"{sample.context}\n\n{sample.question}\n{sample.answer_prefix}{sample.answer}"
    for setting, asked in (("agnostic", False), ("aware", True)):
        prompt = encode(sample, tokenizer, setting)
        whole = torch.cat((prompt.context, prompt.question, prompt.answer), 1)[0]
        assert tokenizer.decode(whole) == text
        assert (sample.question in tokenizer.decode(prompt.context[0])) == asked
        assert prompt.n_prefix == 0
    beginning = copy.deepcopy(tokenizer)
    beginning.bos_token = "<pad>"
    special = [("<pad>", tokenizer.pad_token_id)]
    beginning.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", None, special)
    prompt = encode(sample, beginning)
    assert prompt.n_prefix == 1
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.normalizer = Prepend("_")
    with pytest.raises(SettingError, match="model: got .*reads the parts of a text as it reads the whole.*instruct"):
        encode(sample, adding)
    assert torch.cat((prompt.context, prompt.question, prompt.answer), 1)[0, 1:].tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 11, 22, and 33.", 1.0),
        (" 33, 11 and 22\n\nThese are all, 44", 1.0),
        (" 22\n* 11\n* **33**", 1.0),
        (" 11, 44", 2 / 5),
        (" 11, 11, 11", 2 / 6),
        ("", 0.0),
        (" none of them", 0.0),
    ],
)
def test_f1_of_an_enumeration(text, expected):
    assert f1(text, ("11", "22", "33")) == pytest.approx(expected)


def test_unknown_numbers_become_null():
    assert rounded({"a": float("nan"), "b": [1.23456789, float("inf"), "x", 3]}) == {
        "a": None,
        "b": [1.2346, None, "x", 3],
    }
