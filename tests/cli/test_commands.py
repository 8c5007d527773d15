"""kvpress-moe ask: one prefill, every cache's answer, and errors before any work."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvpress_moe.cli import app, main
from kvpress_moe.cli.ask import run
from kvpress_moe.cli.options import read_context
from kvpress_moe.routers.checkpoint import save_routers
from kvpress_moe.training.config import TrainingConfig
from tests.tiny import promised_routers, tiny_model

TEXT = "The council has promised an answer before the spring. " * 8


def ask(*arguments, stdin=None):
    return CliRunner().invoke(app, ["ask", *arguments], input=stdin)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def figures(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_ask_compares_the_full_cache_the_router_and_each_expert_at_the_same_budget(text_file, model_directory):
    result = ask(text_file, "What?", "When?", "--model", str(model_directory), "--max-new-tokens", "4", "--json")
    got = figures(result)
    methods = ["full cache", "router", *(f"only {name}" for name in got["experts"])]
    assert [row["method"] for row in got["methods"]] == methods
    full, *others = got["methods"]
    assert full["kept_share"] == 1
    assert {row["kept_share"] for row in others} == {got["context_tokens"] // 2 / got["context_tokens"]}
    bytes_per_pair = 2 * 2 * 2 * 8 * 4  # layers, KV heads, keys and values, head dim, float32
    assert full["mib"] * 2**20 == got["context_tokens"] * bytes_per_pair
    assert all(len(row["answers"]) == 2 for row in got["methods"])
    for layer in ("0", "1"):
        assert got["expert_usage_ratios"][layer] == pytest.approx([0.25] * 4, abs=0.01)
    for text in ("full cache", "only selective", "MiB", "What?", "When?"):
        assert text in result.output


def test_experts_are_summed_up_unless_layers_are_asked_for(text_file, model_directory):
    common = (text_file, "What?", "--model", str(model_directory), "--max-new-tokens", "2")
    summary = ask(*common).output
    rows = [line for line in summary.splitlines() if re.match(r"\W*(aggressive|selective)\W", line)]
    assert len(rows) == 2
    assert "top 2 of 4 for each token; means of 2 layers" in summary
    assert "by layer" not in summary
    by_layer = ask(*common, "--layers").output
    assert "Experts by layer" in by_layer
    assert len([line for line in by_layer.splitlines() if re.match(r"\W*[01]\W+\d+%", line)]) == 2


def test_experts_that_all_judge_every_token_take_one_line(text_file, model_directory):
    common = (text_file, "What?", "--model", str(model_directory), "--max-new-tokens", "2")
    output = " ".join(ask(*common, "--experts", "knorm,tova").output.split())
    assert "All 2 experts (knorm, tova) judge every token; hit rate" in output
    assert "mean of 2 layers." in output
    alone = " ".join(ask(*common, "--experts", "knorm").output.split())
    assert "knorm judges every token; hit rate" in alone


def test_square_brackets_are_text_not_markup(text_file, model_directory):
    result = ask(text_file, "What is [/b] in [red] here?", "--model", str(model_directory), "--max-new-tokens", "2")
    assert result.exit_code == 0
    assert "[/b] in [red]" in result.output


def test_the_router_of_one_expert_answers_as_that_expert_alone(text_file, model_directory):
    arguments = [text_file, "Why?", "--experts", "knorm", "--ratio", "0.75", "--model", str(model_directory), "--json"]
    got = figures(ask(*arguments))
    _, router, only = got["methods"]
    assert router["answers"] == only["answers"]


def test_text_comes_from_standard_input_too(model_directory):
    result = ask("-", "What?", "--model", str(model_directory), "--max-new-tokens", "2", "--json", stdin=TEXT)
    assert figures(result)["context_tokens"] == 1 + len(TEXT)  # a byte is a token, and <s> is one


def test_layers_that_are_not_compressed_are_not_counted_as_such(text_file, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(
        "kvpress_moe.model.loading.load_model", lambda *args: (tiny_model("gemma3_text"), chat_tokenizer)
    )
    output = ask(text_file, "What?", "--max-new-tokens", "2").output
    assert "50% of the pairs of 2 of 3 layers removed" in " ".join(output.split())


def test_the_help_of_training_says_the_recipes_defaults():
    text = " ".join(
        re.sub(r"[│\s]+", " ", CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output).split()
    )
    for option in ("samples", "length", "teacher", "value_weight", "epochs", "aux_loss_weight", "budget_weight",
                   "end_to_end", "replay_weight", "long_samples", "seed"):  # fmt: skip
        line = text.partition(f"--{option.replace('_', '-')} ")[2].partition(" --")[0]
        assert re.search(rf"\({getattr(TrainingConfig(), option):g}\)" if option != "teacher" else r"\(both\)", line), (
            option
        )


def test_the_built_in_text_holds_the_answer_to_the_built_in_question():
    assert "7194" in read_context(None)


def test_the_text_is_prefilled_once(text_file, model_directory, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        "kvpress_moe.model.loading.load_model", lambda name, device: (counting(tiny_model("llama"), prompts), tokenizer)
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    run(TEXT, ["What?"], {}, None, "cpu", 2, lambda *args, **kwargs: None)
    assert sum(length > 100 for length in prompts) == 1


def counting(model, prompts):
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return model


WRONG = [
    (["nowhere.txt", "What?"], "TEXT: got 'nowhere.txt'"),
    (["{text}"], "QUESTION: got None"),
    (["{empty}", "What?"], "TEXT: got .*something in it"),
    (["{binary}", "What?"], "TEXT: got .*UTF-8"),
    (["--ratio", "1"], "compression_ratio: got 1.0"),
    (["--experts", "nobody,knorm"], "experts: got 'nobody'"),
    (["--model", "no/such-model"], "model: got 'no/such-model'"),
    (["--device", "cuda:9"], "device: got 'cuda:9'"),
    (["{long}", "What?", "--model", "{model}"], "TEXT: got .*tokens.*at most"),
    (["--router", "nowhere", "--model", "{model}"], "router: 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_use_ends_with_one_line_and_status_2(
    arguments, text, text_file, model_directory, tmp_path, capsys, monkeypatch
):
    files = {"text": text_file, "model": str(model_directory)}
    for name, content in {"empty": b" \n", "binary": b"\xff\xfe\x00", "long": b"word " * 2000}.items():
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(content)
    arguments = [argument.format(**files) for argument in arguments]
    if "cuda:9" in arguments:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kvpress-moe", "ask", *arguments])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr()
    assert stop.value.code == 2
    line = [line for line in output.err.splitlines() if line.startswith("kvpress-moe: error: ")]
    assert len(line) == 1
    assert re.search(text, line[0])
    assert "Traceback" not in output.err


def compress(*arguments):
    return CliRunner().invoke(app, ["compress", *arguments])


@pytest.mark.parametrize("budget", ["uniform", "layer", "global"])
def test_a_cache_on_disk_answers_as_the_live_one(text_file, model_directory, tmp_path, budget):
    common = ["--model", str(model_directory), "--json"]
    recipe = ["--experts", "expected_attention", "--ratio", "0.75", "--budget", budget]
    live = figures(ask(text_file, "What?", "When?", *recipe, *common))
    written = figures(compress(text_file, "--out", str(tmp_path / "book.kv"), *recipe, *common))
    read = figures(ask("--cache", str(tmp_path / "book.kv"), "What?", "When?", *common))
    assert read["answers"] == live["methods"][1]["answers"]
    assert read["context_tokens"] == live["context_tokens"] == written["context_tokens"]
    assert read["mib"] == written["cache_mib"] == live["methods"][1]["mib"]
    assert f"budget='{budget}'" in read["recipe"]


def test_compress_refuses_before_any_work(text_file, model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *args: pytest.fail("the model was loaded"))
    out = ["--out", str(tmp_path / "book.kv")]
    for arguments, text in (
        ([text_file, "--out", str(tmp_path / "no" / "book.kv")], "out: got"),
        ([text_file, "--out", str(tmp_path)], "out: got"),
        (["nowhere.txt", *out], "TEXT: got"),
        ([text_file, *out, "--ratio", "-1"], "compression_ratio: got"),
        ([text_file, *out, "--budget", "heads"], "budget: got"),
    ):
        assert re.match(text, str(compress(*arguments).exception))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_missing_or_foreign_cache_file_is_refused(text_file, model_directory):
    for path in ("nowhere.kv", text_file):
        result = ask("--cache", path, "What?", "--model", str(model_directory))
        assert re.match("cache: .* cannot be read", str(result.exception))
    assert re.match("QUESTION", str(ask("--cache", text_file).exception))


@pytest.fixture(scope="module")
def promising(model_directory, tmp_path_factory):
    """A directory of calibrated routers for the saved model, and a bound that they can promise."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    routers = promised_routers(model)
    directory = save_routers(routers, tmp_path_factory.mktemp("promising"))
    low, high = routers.promises["none"].bounds
    return str(directory), str((low * high) ** 0.5)


def test_ask_and_compress_keep_what_a_promise_needs_and_say_so(text_file, model_directory, promising, tmp_path):
    router, bound = promising
    common = ["--model", str(model_directory), "--router", router, "--max-kl", bound, "--confidence", "0.8", "--json"]
    asked = ask(text_file, "What?", *common, "--max-new-tokens", "2")
    got = figures(asked)
    promise = got["promise"]
    assert "expected KL divergence" in asked.output
    _, ours, *others = got["methods"]
    assert ours["kept_share"] == pytest.approx(promise["share"], abs=0.02)
    assert got["compression_ratio"] is None
    for row in others:  # experts alone get the same size
        assert row["kept_share"] == pytest.approx(ours["kept_share"], abs=0.01)
    out = tmp_path / "text.kv"
    written = CliRunner().invoke(app, ["compress", text_file, "--out", str(out), *common])
    assert figures(written)["promise"]["share"] == pytest.approx(promise["share"])
    assert "expected KL divergence" in written.output
    page = tmp_path / "page.html"
    explored = CliRunner().invoke(app, ["explore", text_file, "--out", str(page), *common])
    assert explored.exit_code == 0, explored.output
    assert '"promise":{' in page.read_text()


@pytest.mark.parametrize("name", ["ask", "compress", "explore"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-kl", "0"], "max_kl: got 0.0"),
        (["--max-kl", "0.02", "--ratio", "0.9"], "ratio: got '--ratio', expected no --ratio with --max-kl"),
        (["--max-kl", "0.02", "--budget", "uniform"], "budget: got 'uniform'"),
        (["--max-kl", "0.02", "--confidence", "1"], "confidence: got 1.0"),
        (["--max-bytes", "7"], "max_bytes: got 7, expected None without max_kl"),
        (["--confidence", "0.8"], "confidence: got 0.8, expected none without --max-kl"),
        (["--max-kl", "0.02", "--max-bytes", "0"], "max_bytes: got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_promises_that_contradict_are_refused_before_anything_is_loaded(
    name, arguments, message, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *_: 1 / 0)
    out = [] if name == "ask" else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [name, text_file, *(["What?"] if name == "ask" else []), *out, *arguments])
    assert message in str(result.exception), result.output


def test_a_saved_cache_takes_no_promise():
    result = ask("--cache", "book.kv", "What?", "--max-kl", "0.02")
    assert "max_kl: got 0.02, expected no --max-kl with --cache" in str(result.exception)
