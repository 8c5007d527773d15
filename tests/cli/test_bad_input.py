"""What users get wrong: each mistake is one line and exit status 2, and nothing is loaded or overwritten for it."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kvpress_moe import SettingError, WriteError, load_model
from kvpress_moe.cli import app, main
from kvpress_moe.cli.options import check_settings
from kvpress_moe.files import write_atomically, write_together
from kvpress_moe.model import loading
from kvpress_moe.press import setting_checks

TEXT = "The council has promised an answer before the spring. " * 8
HALF = "Who signed \udcff?"  # what Python makes of a byte that is not UTF-8


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(result, text):
    assert isinstance(result.exception, SettingError), result.output
    assert re.match(text, str(result.exception)), result.exception
    assert str(result.exception).isprintable()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *args: pytest.fail("the model was loaded"))


# Text that is not UTF-8


@pytest.mark.parametrize("command", ["ask", "compress", "explore"])
def test_text_that_is_not_utf_8_is_refused(command, tmp_path, nothing_is_loaded):
    binary = tmp_path / "binary"
    binary.write_bytes(b"The code is \xff.")
    out = [] if command == "ask" else ["--out", tmp_path / "out"]
    question = ["What?"] if command == "ask" else []
    for source, stdin in (("-", binary.read_bytes()), (binary, None)):
        refused(run(command, source, *question, *out, stdin=stdin), "TEXT: got .*UTF-8.*Byte 13")
    refused(run(command, "caf\udce9.txt", *question, *out), r"TEXT: got 'caf\\udce9.txt', expected UTF-8")


def test_a_question_that_is_not_utf_8_is_refused(text_file, tmp_path, nothing_is_loaded):
    for arguments in (
        ["ask", text_file, "What?", HALF],
        ["ask", "--cache", "book.kv", HALF],
        ["ask", "--cache", "book.kv", "What?", HALF],
        ["explore", text_file, "--question", HALF, "--out", tmp_path / "page.html"],
    ):
        refused(run(*arguments), r"QUESTION: got 'Who signed \\udcff\?', expected UTF-8")
    refused(run("ask", "--model", "caf\udce9"), "model: got .*expected UTF-8")
    refused(run("bench", "--out", "caf\udce9"), "out: got .*expected UTF-8")


def test_line_ends_of_all_systems_are_one(tmp_path):
    from kvpress_moe.cli.options import read_context

    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert read_context(str(tmp_path / "text")) == "a\nb\nc\n"


# Models


def _cut(name, length):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:length])


def _change_weights(change):
    def damage(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return damage


def _change_config(**values):
    def damage(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return damage


def _remove(pattern):
    def damage(directory):
        for path in directory.glob(pattern):
            path.unlink()

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "nothing in it": (_remove("*"), "The directory has no config.json"),
    "weights cut": (_cut("model.safetensors", 3000), "SafetensorError: Error while deserializing header"),
    "weights empty": (_cut("model.safetensors", 0), "SafetensorError"),
    "weights of another shape": (_change_weights(lambda w: w.update({NORM: w[NORM][:-1].contiguous()})), "shape"),
    "a tensor missing": (_change_weights(lambda w: w.pop(NORM)), f"lack 1 tensors, among them {NORM}"),
    "weights missing": (_remove("*.safetensors"), "no file named"),
    "config cut": (_cut("config.json", 20), "not a valid JSON file"),
    "config empty": (_cut("config.json", 0), "not a valid JSON file"),
    "no heads": (_change_config(num_attention_heads=0), "ZeroDivisionError"),
    "a width in words": (_change_config(hidden_size="wide"), "."),
    "unknown kind": (_change_config(model_type="nosuch"), "model type `nosuch`"),
    "tokenizer cut": (_cut("tokenizer.json", 100), "tokenizer that can be read"),
    "tokenizer of another kind": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer that can be read"),
    "tokenizer missing": (_remove("tokenizer*"), "tokenizer that can be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_read_says_why(damage, model_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    change, why = DAMAGES[damage]
    change(directory)
    with pytest.raises(SettingError, match=f"^model: got .*{re.escape(why)}") as caught:
        load_model(str(directory))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_and_a_name_that_no_hub_has_are_no_models(text_file):
    for name, why in ((str(text_file), "It is a file"), ("/no/such/place", "no such directory"), ("a b", "no hub id")):
        with pytest.raises(SettingError, match=f"^model: got .*{why}"):
            load_model(name)


def test_a_device_without_memory_is_none(model_directory):
    with pytest.raises(SettingError, match="^device: got 'meta'"):
        load_model(str(model_directory), "meta")


def _hub_says(error):
    def ask(*args, **kwargs):
        raise error

    return ask


def test_the_hub_is_asked_once(monkeypatch):
    monkeypatch.setattr(loading, "get_hf_file_metadata", _hub_says(ConnectionError("no network")))
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("transformers was asked"))
    with pytest.raises(
        SettingError, match="got 'no/such-model', expected a directory, or a hub id that can be reached"
    ):
        load_model("no/such-model")


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(loading, "HUB_SECONDS", 0.05)
    released = threading.Event()
    monkeypatch.setattr(loading, "get_hf_file_metadata", lambda *args, **kwargs: released.wait(30))
    started = time.perf_counter()
    with pytest.raises(SettingError, match="TimeoutError: the hub did not answer within 0.05 seconds"):
        load_model("no/such-model")
    released.set()
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_model_in_the_hub_cache_needs_no_hub(is_reached, monkeypatch, model_directory):
    answer = (lambda *args, **kwargs: None) if is_reached else _hub_says(ConnectionError("no network"))
    monkeypatch.setattr(loading, "get_hf_file_metadata", answer)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *args: str(model_directory / "config.json"))
    local = []
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        read = getattr(loading, name).from_pretrained

        def from_cache(source, read=read, **options):
            local.append(options["local_files_only"])
            return read(model_directory, **options)

        monkeypatch.setattr(getattr(loading, name), "from_pretrained", from_cache)
    load_model("some/model")
    assert local == [not is_reached] * 2


@pytest.mark.parametrize("level", ["cache", "kvpress-moe", "model"])
def test_a_cache_directory_that_cannot_be_written_names_its_variable(level, tmp_path):
    from kvpress_moe.model.gguf_wheels import Wheel, convert

    directory = tmp_path / "cache" / "kvpress-moe" / "model"
    in_the_way = next(place for place in (directory, *directory.parents) if place.name == level)
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_text("a file")
    wheel = Wheel("any", "any", "any", lambda parts: pytest.fail("the wheel was read"), lambda gguf: None)
    with pytest.raises(SettingError, match="^cache directory: got .*KVPRESS_MOE_CACHE"):
        convert(wheel, directory)
    assert in_the_way.read_text() == "a file"


# Where results go


def _make(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "link to a directory":
        path.symlink_to(path.parent)
    elif kind == "link to itself":
        path.symlink_to(path)
    return path


KINDS = ["pipe", "socket", "directory", "link to a device", "link to a directory", "link to itself"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_never_replaced(kind, tmp_path, monkeypatch, text_file, nothing_is_loaded):
    monkeypatch.chdir(tmp_path)  # paths of sockets must be short
    out = _make(kind, Path("out"))
    before = os.lstat(out)
    for command in ("compress", "explore"):
        refused(run(command, text_file, "--out", out), "out: got 'out', expected a file in a directory that exists")
    with pytest.raises(WriteError, match="^out: cannot be written .*What was there before is intact"):
        write_atomically(out, lambda path: pytest.fail("was written"))
    after = os.lstat(out)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir()) == ["out", "text.txt"]


@pytest.mark.parametrize(("command", "device"), list(product(["compress", "explore"], ["/dev/null", "/dev/full"])))
def test_devices_are_no_files(command, device, text_file, nothing_is_loaded):
    refused(run(command, text_file, "--out", device), f"out: got '{device}'.*It is a device, not a regular file")
    assert stat.S_ISCHR(os.stat(device).st_mode)


@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_link_stays_and_its_target_is_written(is_dangling, tmp_path, text_file, model_directory):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "book.kv", tmp_path / "there" / "target.kv"
    link.symlink_to(Path("there") / "target.kv")
    if not is_dangling:
        target.write_text("old")
    result = run("compress", text_file, "--model", model_directory, "--out", link)
    assert result.exit_code == 0, result.output
    assert link.is_symlink()
    assert target.stat().st_size > 1000
    assert os.listdir(tmp_path / "there") == ["target.kv"]


@pytest.mark.parametrize("command", ["compress", "explore"])
def test_the_text_is_not_overwritten(command, text_file, nothing_is_loaded):
    link = text_file.with_name("link")
    link.symlink_to(text_file)
    for out in (text_file, link):
        refused(run(command, text_file, "--out", out), "out: got .*expected another file than TEXT")
    assert text_file.read_text() == TEXT


def test_a_directory_that_cannot_be_made_is_refused_at_once(tmp_path, nothing_is_loaded):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to("nowhere")
    for arguments in (["train"], ["bench"], ["bench", "speed"], ["report", tmp_path]):
        for out in (file, file / "deeper", link, "/dev/null", tmp_path / ("x" * 300)):
            refused(run(*arguments, "--out", out), "out: got .*expected a directory that can be written, or a new name")
    refused(run("train", "--out", tmp_path / "new", "--shards", file), "shards: got")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_rename_that_fails_midway_says_what_is_new_already(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def fail_at_b(source, target):
        if Path(target).name == "b":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail_at_b)
    writes = {tmp_path / name: lambda path: path.write_text("new") for name in ("a", "b")}
    with pytest.raises(WriteError, match="b: cannot be replaced .*but a beside it was replaced already") as caught:
        write_together(writes)
    assert "intact" not in str(caught.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "old"}
    with pytest.raises(WriteError, match="What was there before is intact"):
        write_together({tmp_path / "b": lambda path: path.write_text("new")})


# Options


@pytest.mark.parametrize(
    "option",
    [["--ratio", "0.5"], ["--experts", "knorm"], ["--budget", "layer"], ["--precision", "mixed"], ["--layers"]],
)
def test_a_cache_file_brings_its_own_recipe(option, nothing_is_loaded):
    name = option[0].strip("-")
    refused(
        run("ask", "--cache", "book.kv", "What?", *option),
        f"{name}: got .*, expected no --{name} with --cache.*compress the text again",
    )


def test_json_is_alone_on_standard_output(tmp_path, text_file, model_directory):
    common = ["--model", model_directory, "--json"]
    for arguments, said in (
        (["ask", text_file, "What?", "--layers"], "tokens, prefilled once"),
        (["compress", text_file, "--out", tmp_path / "book.kv"], "tokens prefilled in"),
        (["ask", "--cache", tmp_path / "book.kv", "What?"], "loaded in"),
        (["explore", text_file, "--out", tmp_path / "page.html"], "open it in a browser"),
    ):
        result = run(*arguments, *common)
        assert result.exit_code == 0, result.output
        assert "context_tokens" in json.loads(result.stdout)
        assert said in " ".join(result.stderr.split())
        without = run(*arguments, *common[:-1])
        assert said in " ".join(without.stdout.split())
    refused(run("explore", "--serve", "--json"), "serve: got True, expected no --json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("compression_ratio", 1.0), ("compression_ratio", float("nan")), ("budget", "heads"), ("router", "")],
)
def test_commands_and_press_refuse_with_the_same_words(field, value):
    given = {"compression_ratio": 0.5, "budget": None, "router": None} | {field: value}
    with pytest.raises(SettingError) as by_press:
        setting_checks.CHECKS[field](value)
    with pytest.raises(SettingError) as by_command:
        check_settings(*given.values())
    assert str(by_press.value) == str(by_command.value)


WRONG = {
    "ask --ratio 1": "compression_ratio: got 1.0",
    "ask --ratio half": "ratio: got 'half', expected a number",
    "ask --budget heads": "budget: got 'heads'",
    "ask --max-new-tokens 0": "max_new_tokens: got 0",
    "ask --max-new-tokens 1.5": "max_new_tokens: got '1.5', expected a whole number",
    "ask --no-such-option": "No such option",
    "compress text.txt": "out: got None",
    "compress text.txt --out book.kv --ratio nan": "compression_ratio: got nan",
    "explore --ratio 0 --out page.html": "ratio: got 0.0",
    "explore --serve --port 70000": "port: got 70000",
    "bench --ratios 0.5,1": "ratios: got 1.0",
    "bench --lengths 1e3": "lengths: got '1e3'",
    "bench --limit 0": "limit: got 0",
    "bench --seed -1": "seed: got -1",
    "bench --min-share 2": "min_share: got 2.0",
    "bench speed --ratio 0": "ratio: got 0.0",
    "bench speed --rounds 0": "rounds: got 0",
    "train --out routers --length 3": "length: got 3",
    "train --out routers --seed 99999999999999999999": "seed: got 99999999999999999999",
    "train --out routers --value-weight nan": "value_weight: got nan",
    "report": "RUNS: got None, expected a value. It is missing.",
}
PROGRAM = """
import contextlib, io, sys
from kvpress_moe.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv, said = ["kvpress-moe", *line.split()], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            print(end.code, said.getvalue().strip())
assert not {"torch", "transformers", "kvpress"} & set(sys.modules)
"""


def test_wrong_numbers_are_refused_before_torch_is_imported(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join(WRONG), capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (command, text), line in zip(WRONG.items(), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"2 kvpress-moe: error: {text}"), (command, line)


# How a command ends


def ends(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["kvpress-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_control_c_ends_with_status_130(text_file, monkeypatch, capsys):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", _hub_says(KeyboardInterrupt()))
    assert ends(monkeypatch, "ask", text_file, "What?") == 130
    assert "Traceback" not in capsys.readouterr().err


def in_a_process(*arguments, stdout):
    command = [sys.executable, "-m", "kvpress_moe", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def test_a_reader_that_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = in_a_process("--version", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        done = in_a_process("--version", stdout=full)
    assert done.returncode == 2
    assert re.fullmatch("kvpress-moe: error: standard output: cannot be written.*\n", done.stderr)


def test_a_closed_standard_output_is_no_error():
    code = "import sys; sys.stdout = None; sys.argv = ['', '--version']; from kvpress_moe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_no_error(monkeypatch, capsys):
    assert not ends(monkeypatch, "ask", "--help")
    assert not ends(monkeypatch, "--version")
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["best", "k7v4", "k8v4,k8v4", "8,4", "", "k٤v4", f"k{'8' * 5000}v4"])
def test_a_wrong_precision_is_refused_before_anything_is_loaded(wrong, text_file, tmp_path, nothing_is_loaded):
    for command in (["ask"], ["compress", text_file, "--out", tmp_path / "x.kv"]):
        refused(run(*command, "--precision", wrong), "precision: got .*, expected mixed, or names such as k8v4")


def test_a_packed_cache_file_answers_as_the_live_cache(text_file, tmp_path, model_directory):
    common = ["--model", model_directory, "--json"]
    packed = ["--ratio", "0.8", "--precision", "k8v4,k4v2"]
    asked = json.loads(run("ask", text_file, "What?", *packed, *common).stdout)
    assert asked["strategies"]["K8V4"]["pairs"] + asked["strategies"]["K4V2"]["pairs"] > 0
    assert asked["methods"][1]["kept_share"] <= 0.2
    run("compress", text_file, "--out", tmp_path / "book.kv", *packed, *common)
    saved = json.loads(run("ask", "--cache", tmp_path / "book.kv", "What?", *common).stdout)
    assert saved["answers"] == asked["methods"][1]["answers"]
