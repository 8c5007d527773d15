"""A Ray cluster gives the records that this machine would have written, also when a worker dies."""

import os

import pytest

from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.benchmark.records import read_records
from kvpress_moe.benchmark.runner import run
from tests.benchmark.test_runner import without_seconds

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture
def chat_model(model_directory, chat_tokenizer, tmp_path):
    from shutil import copytree

    directory = tmp_path / "model"
    copytree(model_directory, directory)
    chat_tokenizer.save_pretrained(directory)
    return str(directory)


def test_records_are_the_same_and_a_dead_workers_sample_is_done_again(chat_model, tmp_path, monkeypatch):
    from kvpress_moe.benchmark.ray_backend import over_ray

    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    flag = tmp_path / "died"
    plan = Plan(
        model=chat_model,
        methods=("snapkv", "random", f"dying=tests.benchmark.dying:DyingPress(flag='{flag}')"),
        tasks=("needle_noise", "kv_list"),
        ratios=(0.5,),
        lengths=(700,),
        limit=2,
    )
    run(plan, tmp_path / "ray", "bench", spread=over_ray("local"))
    assert flag.exists()
    run(plan, tmp_path / "local", "bench")
    by_sample = [
        sorted(without_seconds(read_records(tmp_path / name)), key=lambda record: record["sample"])
        for name in ("ray", "local")
    ]
    assert len(by_sample[0]) == 4
    assert by_sample[0] == by_sample[1]
