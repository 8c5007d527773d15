"""A disk that is full: the old file is intact, the error says so in full, and no temporary file is left."""

import json
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvpress_moe import SettingError, WriteError, save_cache, save_routers
from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.benchmark.records import Records
from kvpress_moe.benchmark.runner import run
from kvpress_moe.benchmark.speed import Row
from kvpress_moe.cli import main
from kvpress_moe.files import write_atomically
from kvpress_moe.report.benchmark_report import write_report
from kvpress_moe.report.speed_report import draw
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.trainer import train
from tests.tiny import calibrated_routers, prefill, tokens

ROOM = 600  # bytes that any one file may have


@contextmanager
def full_disk(room=ROOM):
    """Writing beyond so many bytes of a file fails in the kernel, in Python as in safetensors' Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


PLAN = Plan(methods=("knorm",), tasks=("kv_list",), ratios=(0.5, 0.75), lengths=(300,), limit=2)
CONFIG = TrainingConfig(
    long_samples=0,
    experts=("learned", "keydiff"),
    top_k=2,
    samples=2,
    study=0,
    length=300,
    tasks=("kv_list",),
    epochs=1,
)
ROWS = [
    Row("prefill", "no press", 512, 1, 1.0, 0.9, 1.1, 1.0, 0),
    Row("prefill", "SnapKV", 512, 1, 1.0, 0.9, 1.1, 1.1, 9),
]


@pytest.fixture
def writers(llama, chat_tokenizer, tmp_path):
    """What the package writes, by name: a function that writes it anew."""
    out = tmp_path / "out"
    out.mkdir()
    evaluator = Evaluator(PLAN, (llama, chat_tokenizer))
    ids = tokens(200)
    return {
        "routers": lambda: save_routers(calibrated_routers(llama), out),
        "cache": lambda: save_cache(out / "book.kv", prefill(llama, ids), llama, ids),
        "records": lambda: run(PLAN, out, "bench", evaluator),
        "report": lambda: write_report([tmp_path / "run"], out),
        "shards": lambda: train(llama, chat_tokenizer, CONFIG, out),
        "speed": lambda: draw(ROWS, out / "speed.png"),
        "a run": lambda: run(PLAN, tmp_path / "run", "bench", evaluator),
    }


@pytest.mark.parametrize("what", ["routers", "cache", "report", "shards", "fit", "speed"])
def test_files_are_written_whole_or_not_at_all(writers, tmp_path, what):
    out, write = tmp_path / "out", writers["shards" if what == "fit" else what]
    if what == "report":
        writers["a run"]()
    with full_disk(), pytest.raises(WriteError, match=r"cannot be written .*What was there before is intact"):
        write()
    assert all(len(data) <= ROOM for data in contents(out).values())
    write()
    whole = contents(out)
    for path in list(out.glob({"shards": "*.safetensors", "fit": "fitted-*/layer-*"}.get(what, "none")))[:1]:
        path.unlink()  # what is there is not written again
    before = contents(out)
    with full_disk(), pytest.raises(WriteError, match="cannot be written"):
        write()
    assert contents(out) == before
    write()
    assert contents(out).keys() == whole.keys()  # and no temporary file


def test_weights_and_card_of_routers_are_replaced_together(llama, tmp_path, monkeypatch):
    """Room for the weights alone leaves the old pair, not new weights with an old card."""
    save_routers(calibrated_routers(llama), tmp_path)
    before = contents(tmp_path)
    room = len(before[Path("routers.safetensors")])
    with full_disk(room), pytest.raises(WriteError, match=r"routers\.json: cannot be written"):
        save_routers(calibrated_routers(llama, seed=1), tmp_path, {"notes": "x" * room})
    assert contents(tmp_path) == before


def test_records_keep_their_earlier_lines_and_go_on(writers, tmp_path):
    out = tmp_path / "out"
    writers["records"]()
    whole = contents(out)
    records, header = out / "records.jsonl", out / "run.json"
    first, second = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(first)
    before = contents(out)
    journal = Records(out, json.loads(header.read_text()))
    room = full_disk(len(first) + len(second) // 2)
    with room, pytest.raises(SettingError, match="a disk with room.*Earlier records are intact"):
        journal.add(json.loads(second))
    assert contents(out) == before
    with full_disk(100), pytest.raises(WriteError, match=r"run\.json: cannot be written"):
        writers["records"]()
    assert contents(out) == before
    writers["records"]()
    assert len(records.read_bytes().splitlines()) == 2
    assert contents(out).keys() == whole.keys()


def test_the_command_says_it_in_one_line(model_directory, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("The code is 7194. " * 20)
    arguments = ["compress", str(tmp_path / "text.txt"), "--model", str(model_directory)]
    monkeypatch.setattr("sys.argv", ["kvpress-moe", *arguments, "--out", str(tmp_path / "book.kv")])
    with full_disk(), pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said.startswith(f"kvpress-moe: error: {tmp_path / 'book.kv'}: cannot be written")


def test_a_place_that_is_no_directory_is_said_too(tmp_path):
    with pytest.raises(WriteError, match="book.kv: cannot be written .*No such file"):
        write_atomically(tmp_path / "nowhere" / "book.kv", Path.touch)
