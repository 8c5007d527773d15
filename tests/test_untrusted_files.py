"""Files from strangers are taken or refused with one of the package's errors: no crash, no bomb, nothing outside."""

import ast
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import kvpress_moe
from fuzz.mutations import join_tensors, split_tensors
from fuzz.targets import CONFIG, HEADER, TARGETS, signed
from fuzz.trial import forget_peak, peak, resident, try_files, try_one
from kvpress_moe import CheckpointError, RouterConfig, Routers, load_cache, load_routers, save_routers
from kvpress_moe.benchmark.records import Records, read_header, read_records
from kvpress_moe.errors import SettingError
from kvpress_moe.model.fingerprint import check_fingerprint, model_fingerprint
from kvpress_moe.training.shards import Shards
from tests.tiny import tiny_model

PACKAGE = Path(kvpress_moe.__file__).parent


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {target.name: target(tmp_path_factory.mktemp("fuzz") / "input") for target in TARGETS}


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_damaged_and_forged_files_are_taken_or_refused(targets, name):
    seen = {True: 0, False: 0}

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.binary(min_size=4, max_size=64))
    def one(data):
        seen[try_one(targets[name], data).taken] += 1

    one()
    assert seen[True]
    assert seen[False]


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_the_files_that_the_damage_is_done_to_are_taken(targets, name):
    for files in targets[name].seeds:
        assert try_files(targets[name], files).taken


def test_nothing_in_the_package_reads_pickles_or_runs_what_it_read():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.load" not in text, path
        assert "weights_only" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & forbidden, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path


# ── routers ──


@pytest.fixture
def saved(tmp_path):
    return save_routers(Routers(CONFIG, model_fingerprint(tiny_model("llama"))), tmp_path / "routers")


def change_card(directory, **config):
    card = json.loads((directory / "routers.json").read_text())
    card["config"] |= config
    (directory / "routers.json").write_text(json.dumps(card))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(saved, bad):
    tensors = load_file(saved / "routers.safetensors")
    tensors["layers.1.up.weight"][0, 0] = bad
    save_file(tensors, saved / "routers.safetensors")
    with pytest.raises(CheckpointError, match=r"router: .*layers\.1\.up\.weight holds NaN or infinite numbers"):
        load_routers(saved)


def test_a_hit_rate_may_be_unknown_but_not_infinite(saved):
    assert load_routers(saved).layers[0].hit_rate.isnan().all()
    tensors = load_file(saved / "routers.safetensors")
    tensors["layers.1.hit_rate"][0] = torch.inf
    save_file(tensors, saved / "routers.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.hit_rate holds NaN or infinite"):
        load_routers(saved)


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 10**9},
        {"hidden_size": 10**9},
        {"bottleneck": 2**30},
        {"num_heads": 10**6},
        {"learned": 10**8},
        {"num_layers": 2**63},
        {"num_layers": True},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"top_k": 3},
        {"experts": "learned"},
        {"experts": ["knorm", "tova"]},
        {"router_type": ["pikv"]},
        {"trained": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_sizes_that_are_only_declared_are_refused_before_anything_is_built(saved, config, monkeypatch):
    change_card(saved, **config)
    monkeypatch.setattr("kvpress_moe.routers.checkpoint.Routers", lambda *_: pytest.fail("routers were built"))
    with pytest.raises(CheckpointError, match="router: "):
        load_routers(saved)


@pytest.mark.parametrize("router_type", ["base", "pikv"])
@pytest.mark.parametrize("sizes", [(0, 0, False), (2, 0, False), (2, 3, False), (2, 3, True)])
def test_the_number_of_weights_that_a_configuration_asks_for_is_that_of_its_routers(router_type, sizes):
    heads, learned, sees = sizes
    experts = ("learned", "knorm") if learned else ("knorm", "tova")
    sizes = {"bottleneck": 5, "num_heads": heads, "learned": learned, "learned_sees": sees}
    for strategies in (False, True)[: 1 + bool(heads)]:
        config = RouterConfig(router_type, experts, 3, 8, strategies=strategies, **sizes)
        assert 3 * config.num_weights == sum(tensor.numel() for tensor in Routers(config).state_dict().values())
    assert RouterConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_loading_half_precision_routers_takes_twice_their_file_beside_the_file(tmp_path):
    config = RouterConfig("base", ("knorm", "tova"), 32, 4096, bottleneck=64)
    save_routers(Routers(config), tmp_path, dtype=torch.float16)
    size = (tmp_path / "routers.safetensors").stat().st_size
    assert size > 16 * 2**20
    if not forget_peak():
        pytest.skip("this system does not say the peak of memory")
    before = resident()
    routers = load_routers(tmp_path)
    assert peak() - before < 3 * size + 8 * 2**20  # the file itself is mapped, not copied
    assert routers.config == config


def test_a_pipe_is_refused_and_not_waited_for(saved, llama):
    for name in ("routers.safetensors", "routers.json"):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(CheckpointError, match="is no file"):
            load_routers(saved)
        with pytest.raises(CheckpointError, match="is no file"):
            load_cache(saved / name, llama)


def test_a_fingerprint_of_no_number_agrees_with_no_model(llama):
    own = model_fingerprint(llama)
    with pytest.raises(CheckpointError, match="another model of the same size"):
        check_fingerprint(own | {"samples": [float("nan")] * 64}, own, "router")


def test_routers_for_other_heads_are_refused_before_a_layer_runs(llama):
    config = replace(CONFIG, hidden_size=32, num_heads=4, experts=("knorm", "tova"), learned=0, learned_sees=False)
    press = kvpress_moe.MoERouterPress(experts=["knorm", "tova"], router=Routers(config))
    with pytest.raises(CheckpointError, match="calibrated for 4 KV heads, the model has 2"), press(llama):
        llama(torch.ones(1, 9, dtype=torch.long))


# ── caches ──


def forge(files, change):
    """A cache file whose header was changed, with the digest that belongs to it."""
    tensors, body = split_tensors(files["book.kv"])
    header = json.loads(tensors["__metadata__"]["header"])
    changed = change(header, tensors, body)
    tensors["__metadata__"]["header"] = json.dumps(header)
    return {"book.kv": signed(join_tensors(tensors, changed if isinstance(changed, bytes) else body))}


def huge_batch(header, tensors, body):
    """A batch of 2**40 rows without a pair, which takes no byte."""
    for name in ("0.new_keys", "0.new_values", "1.new_keys", "1.new_values"):
        tensors[name]["shape"] = [2**40, 2, 0, 8]


def stride_overflow(header, tensors, body):
    """Strides that torch cannot count."""
    for name in ("new_keys", "new_values"):
        tensors[f"0.{name}"]["shape"] = [1, 2, 0, 2**62]


def not_a_number(header, tensors, body):
    return b"\0\0\xc0\x7f" + body[4:]


@pytest.mark.parametrize(
    "change",
    [
        huge_batch,
        stride_overflow,
        not_a_number,
        lambda header, *_: header["layers"][0]["lengths"][0].reverse() or header["layers"][0]["lengths"].append([1, 1]),
        lambda header, *_: header["layers"][0]["lengths"][0].__setitem__(0, -1),
        lambda header, *_: header["layers"][0].update(lengths=[[2**31, 1]]),
        lambda header, *_: header["layers"][0].update(n_read=1),
        lambda header, *_: header["layers"].pop(),
        lambda header, *_: header["layers"][0].update(kind="quantised"),
        lambda header, *_: header.update(n_tokens=-1),
        lambda header, *_: header.update(fingerprint=[]),
        lambda header, *_: header.update(recipe=["rm"]),
    ],
)
def test_a_forged_cache_with_the_right_digest_is_refused(targets, change):
    target = targets["caches"]
    assert not try_files(target, forge(target.seeds[0], change)).taken
    assert try_files(target, forge(target.seeds[0], lambda *_: None)).taken  # the digest itself is no defence


def test_a_forged_file_of_an_old_version_is_refused(targets):
    """Such files do not say how many tokens were read, so the shape tells it."""

    def flat(header, tensors, body):
        header["layers"][0] = {"kind": "shortened"}
        for name in ("keys", "values"):
            shape = tensors[f"0.{name}"]["shape"]
            tensors[f"0.{name}"]["shape"] = [shape[0] * shape[1] * shape[2] * shape[3]]

    target = targets["caches"]
    assert not try_files(target, forge(target.seeds[1], flat)).taken


def test_a_loaded_cache_does_not_change_with_its_file(targets):
    target = targets["caches"]
    target.put(target.seeds[0])
    path = target.directory / "book.kv"
    layer = load_cache(path, target.model).cache.layers[0]
    before = layer.flat_keys.clone()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(layer.flat_keys, before)


# ── records and shards ──


def bomb(directory, line, size=2**22):
    (directory / "run.json").write_text(json.dumps(HEADER))
    (directory / "records.jsonl.gz").write_bytes(gzip.compress(line * (size // len(line)), 9))


@pytest.mark.parametrize("line", [b"[", b"[]\n", b"\n", None], ids=["one line", "many", "empty", "real"])
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(targets, tmp_path, line):
    bomb(tmp_path, line or targets["records"].seeds[0]["records.jsonl"])
    known, before = forget_peak(), resident()
    with pytest.raises(SettingError, match="^RUN: got .*Line"):
        for _ in read_records(tmp_path):
            pass
    with pytest.raises(SettingError, match="^RUN: got|^out: got"):
        Records(tmp_path, HEADER).done()
    assert not known or peak() - before < 8 * 2**20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8 * 2**20


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "[" + "1," * 2**20 + "1]", '{"format": 1}', "[]", "\xff"]
)
def test_json_that_is_too_deep_too_long_or_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(SettingError, match="^RUN: got"):
        read_header(tmp_path)


@pytest.mark.parametrize("name", ["../../out", "/etc/passwd", "..", "a/../../b", "\\\\host\\x"])
def test_shards_stay_in_their_directory_whatever_their_prompts_are_called(tmp_path, name):
    assert Shards(tmp_path).path(name).resolve().parent == tmp_path.resolve()
