"""The loaders under test: valid files to start from, and what must be true if a file is accepted."""

from __future__ import annotations

import gzip
import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fuzz.choices import Choices
from fuzz.mutations import (
    dump,
    join_tensors,
    mutate_bytes,
    mutate_gzip,
    mutate_json,
    mutate_lines,
    mutate_tensors,
    split_tensors,
)
from kvpress_moe import MoERouterPress, RouterConfig, Routers, load_cache, load_routers, save_cache, save_routers
from kvpress_moe.benchmark.records import COLUMNS, Records, read_header
from kvpress_moe.benchmark.results import load
from kvpress_moe.cache import PackedLayer
from kvpress_moe.cache import saved_cache as cache_files
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.codes.key_transform import KeyTransform
from kvpress_moe.codes.transform_files import FILE as TRANSFORMS
from kvpress_moe.codes.transform_files import writer
from kvpress_moe.model.fingerprint import model_fingerprint
from tests.tiny import prefill, tiny_model, tokens

Files = dict[str, bytes]

CONFIG = RouterConfig("pikv", ("learned", "knorm"), 2, 8, bottleneck=4, num_heads=2, learned=3, learned_sees=True)


class Target(ABC):
    """
    One loader under test.

    Parameters
    ----------
    directory : Path
        Directory for the files of the current input; faster if it is in memory.
    """

    name: str

    def __init__(self, directory: Path):
        self.directory = directory
        self.seeds: list[Files] = self.make_seeds()

    @abstractmethod
    def make_seeds(self) -> list[Files]:
        """Sets of files that the loader accepts."""

    @abstractmethod
    def mutate(self, choices: Choices, files: Files) -> Files:
        """The same files, with some of them changed."""

    @abstractmethod
    def load(self) -> None:
        """Load the files in the directory, and assert what must be true if they are accepted."""

    def put(self, files: Files) -> None:
        """Write exactly these files into the directory, and no others."""
        shutil.rmtree(self.directory, ignore_errors=True)
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def read(self, *names: str) -> Files:
        return {name: (self.directory / name).read_bytes() for name in names}


def changed_json(choices: Choices, data: bytes) -> bytes:
    if choices.one_in(8):
        return mutate_bytes(choices, data)
    return dump(mutate_json(choices, json.loads(data))).encode("utf-8", "surrogatepass")


class RoutersTarget(Target):
    name = "routers"

    def make_seeds(self) -> list[Files]:
        plain = replace(CONFIG, router_type="base", experts=("knorm",), num_heads=0, learned=0, top_k=1)
        seeds = []
        for config, dtype in ((CONFIG, torch.float32), (CONFIG, torch.float16), (plain, torch.bfloat16)):
            about = model_fingerprint(tiny_model("llama"))
            save_routers(Routers(config, about), self.directory, {"loss": 0.5}, dtype)
            seeds.append(self.read("routers.json", "routers.safetensors"))
        shapes = (2, 8), (2, 8, 8), (2, 8)  # of two heads
        writer({idx: KeyTransform(*(torch.randn(s).half() for s in shapes)) for idx in (0, 1)})(
            self.directory / TRANSFORMS
        )
        seeds.append(seeds[0] | self.read(TRANSFORMS))
        return seeds

    def mutate(self, choices: Choices, files: Files) -> Files:
        which = choices.below(3)
        if TRANSFORMS in files and choices.below(2):
            return files | {TRANSFORMS: mutate_tensors(choices, files[TRANSFORMS])}
        if which != 1:
            files = files | {"routers.json": changed_json(choices, files["routers.json"])}
        if which != 0:
            files = files | {"routers.safetensors": mutate_tensors(choices, files["routers.safetensors"])}
        return files

    def load(self) -> None:
        routers = load_routers(self.directory)
        for name, tensor in routers.state_dict().items():
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all() or name.endswith("hit_rate"), name
        for transform in (routers.key_transforms or {}).values():
            assert transform.analysis.isfinite().all()


class CachesTarget(Target):
    name = "caches"

    def make_seeds(self) -> list[Files]:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.model = tiny_model("llama")
        seeds = []
        for press in (
            MoERouterPress(experts=["knorm"], budget="global"),
            MoERouterPress(experts=["knorm"], budget="uniform"),
            MoERouterPress(experts=["knorm"], budget="global", precision="mixed"),
            None,
        ):
            cache = prefill(self.model, tokens(12), press)
            save_cache(self.directory / "book.kv", cache, self.model, tokens(12), press)
            seeds.append(self.read("book.kv"))
        return seeds

    def mutate(self, choices: Choices, files: Files) -> Files:
        data = files["book.kv"]
        if choices.below(2):
            header, body = split_tensors(data)
            text = dump(mutate_json(choices, json.loads(header["__metadata__"]["header"])))
            header["__metadata__"]["header"] = text
            data = join_tensors(header, body)
        else:
            data = mutate_tensors(choices, data)
        return {"book.kv": data if choices.one_in(4) else signed(data)}

    def load(self) -> None:
        saved = load_cache(self.directory / "book.kv", self.model)
        assert len(saved.cache.layers) == 2
        for layer in saved.cache.layers:
            if isinstance(layer, PackedLayer):
                assert all(keys.isfinite().all() for heads in layer.heads() for keys, _ in heads)
            elif isinstance(layer, RaggedLayer):
                assert sum(len(keys) for heads in layer.heads() for keys, _ in heads) == len(layer.flat_keys)
            assert layer.get_seq_length() >= 0


def signed(data: bytes) -> bytes:
    """A cache file with a correct digest for its content, as a forger would make it; unchanged if impossible."""
    from safetensors.torch import load as load_tensors

    try:
        header, body = split_tensors(data)
        digest = cache_files._digest(header["__metadata__"]["header"], load_tensors(data))
        header["__metadata__"]["sha256"] = digest
        return join_tensors(header, body)
    except Exception:  # not a safetensors file: no digest can be correct
        return data


HEADER: dict[str, Any] = {
    "format": 1,
    "model": "a/model",
    "fingerprint": {},
    "versions": {"torch": "2"},
    "seed": 0,
    "split": "test",
    "setting": "agnostic",
    "sinks": 4,
    "recent": 16,
    "min_share": 0.2,
    "commands": ["kvpress-moe bench"],
    "methods": {"full": {"group": "reference"}, "knorm": {"group": "kvpress"}},
}


class RecordsTarget(Target):
    name = "records"

    def make_seeds(self) -> list[Files]:
        lines = b""
        for index in range(3):
            rows = [["full", 0.0, 1.0, 0.1, 0.0, 1.0, 100, 800, 0.0], ["knorm", 0.5, 0.5, 0.2, 0.1, None, 50, 400, 0.1]]
            record = {"sample": f"prose/{index}", "task": "prose", "length": 100, "index": index, "depth": None}
            record |= {"tokens": 100, "prefill_s": 2.0, "columns": list(COLUMNS), "results": rows}
            lines += json.dumps(record).encode() + b"\n"
        header = json.dumps(HEADER).encode()
        return [
            {"run.json": header, "records.jsonl": lines},
            {"run.json": header, "records.jsonl.gz": gzip.compress(lines)},
        ]

    def mutate(self, choices: Choices, files: Files) -> Files:
        name = next(name for name in files if name != "run.json")
        header, lines = files["run.json"], files[name]
        which = choices.below(4)
        if which == 0:
            header = changed_json(choices, header)
        if name.endswith(".gz"):
            lines = mutate_gzip(choices, lines)
        elif which:
            lines = mutate_lines(choices, lines)
        return {"run.json": header, name: lines}

    def load(self) -> None:
        results = load([self.directory])
        assert results.samples
        assert results.ratios


class ResumedTarget(RecordsTarget):
    """A run that continues from such records. This loader also writes."""

    name = "resumed runs"

    def load(self) -> None:
        records = Records(self.directory, HEADER)
        cells = records.done()
        assert all(isinstance(sample, str) for sample in cells)
        assert read_header(self.directory)["methods"]["knorm"]


TARGETS: tuple[type[Target], ...] = (
    RoutersTarget,
    CachesTarget,
    RecordsTarget,
    ResumedTarget,
)
