"""
What the package does on a GPU, gone through on one that is not there, each case compared with the CPU.

    python -m tests.on_pretended_gpu            all cases; prints one line each, ends with an error if one fails
    python -m tests.on_pretended_gpu budget     those whose names begin so
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress import AdaKVPress, ExpectedAttentionPress
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from kvpress_moe import MoERouterPress, RaggedCache, RouterConfig, Routers, load_cache, save_cache
from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.plan import Plan
from kvpress_moe.benchmark.records import read_records
from kvpress_moe.benchmark.runner import run
from kvpress_moe.benchmark.speed import SpeedPlan, measure
from kvpress_moe.cli import app
from kvpress_moe.experts.kvpress_scorers import KVPRESS_EXPERTS
from kvpress_moe.experts.registry import NAMED_EXPERTS
from kvpress_moe.training.trainer import train
from tests.pretend_gpu import NAME, pretended_gpu, register, waits
from tests.tiny import byte_tokenizer, calibrated_routers, padded_tokens, prefill, tiny_model, tokens
from tests.training.test_training import CONFIG

Result = Any  # tensors, numbers, texts and lists of them: the same on every device
CASES: dict[str, Callable[[str], Result]] = {}


def case(name: str) -> Callable[[Callable[[str], Result]], Callable[[str], Result]]:
    def register_case(function: Callable[[str], Result]) -> Callable[[str], Result]:
        CASES[name] = function
        return function

    return register_case


def read_on(model, ids: Tensor, press, device: str) -> list[Tensor]:
    """Prompt under the press, a question of three tokens and one more after it: the logits."""
    model, ids = model.to(device), ids.to(device)
    cache = prefill(model, ids, press)
    read, results = ids.shape[1], []
    for n_new in (3, 1):
        positions = torch.arange(read, read + n_new, device=device)[None]
        with torch.no_grad():
            question = tokens(n_new, len(ids), seed=n_new).to(device)
            results.append(model(question, past_key_values=cache, position_ids=positions).logits)
        read += n_new
    return results


def compress(settings: dict[str, Any], family: str, device: str) -> Result:
    press = MoERouterPress(0.5, **settings)
    results = read_on(tiny_model(family), tokens(90, 2), press, device)
    return [results, press.get_stats()]


for budget in ("uniform", "layer", "global"):
    for chosen in ({"num_experts": 4, "cache_aware": True}, {"experts": "strong"}, {"num_experts": 8, "top_k": 3}):
        what = " ".join(f"{field}={value}" for field, value in chosen.items())
        CASES[f"budget {budget}, {what}"] = partial(compress, {"budget": budget, **chosen}, "llama")
for expert in dict.fromkeys((*NAMED_EXPERTS, *KVPRESS_EXPERTS)):
    if expert not in ("learned", "observed_attention", "random"):  # which need routers, eager attention, a generator
        CASES[f"expert {expert}"] = partial(compress, {"experts": [expert]}, "llama")
for family in ("mistral", "qwen3", "phi3", "gemma3_text"):
    CASES[f"family {family}"] = partial(compress, {"experts": ["keydiff", "expected_attention"]}, family)


@case("decoding waits for the device once a token, however many layers")
def decoding_waits(device: str) -> Result:
    found = []
    for num_layers, budget in ((2, "global"), (6, "global"), (6, "uniform")):
        model = tiny_model("llama", num_hidden_layers=num_layers).to(device)
        cache = prefill(model, tokens(90).to(device), MoERouterPress(0.5, experts=["keydiff"], budget=budget))
        with torch.no_grad():
            model(tokens(1, seed=1).to(device), past_key_values=cache)
            waits.clear()
            model(tokens(1, seed=2).to(device), past_key_values=cache)
        found.append(len(waits))
    return found if device == NAME else [1, 1, 1]


@case("a layer's compression waits for the device a few times, whatever the prompt's length")
def press_waits(device: str) -> Result:
    """For kvpress's hook, capacity, what is finite (twice), each of three experts, and what stays (once, or thrice)."""
    by_layer = []
    for budget in ("uniform", "global"):
        for length in (90, 180):
            found = []
            for num_layers in (3, 4):
                model = tiny_model("llama", num_hidden_layers=num_layers).to(device)
                press = MoERouterPress(0.5, router=calibrated_routers(model), budget=budget)
                waits.clear()
                prefill(model, tokens(length).to(device), press)
                found.append(len(waits))
            by_layer.append(found[1] - found[0])
    return by_layer if device == NAME else [8, 8, 10, 10]


@case("trained routers")
def trained_routers(device: str) -> Result:
    model = tiny_model("llama")
    press = MoERouterPress(0.5, router=calibrated_routers(model), budget="global")
    return read_on(model, tokens(90), press, device)


@case("routers that route to two of four")
def sparse_routers(device: str) -> Result:
    routers = Routers(RouterConfig("pikv", ("knorm", "keydiff", "snapkv", "tova"), 2, 32, top_k=2))
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    press = MoERouterPress(0.5, router=routers)
    return [read_on(tiny_model("llama"), tokens(90), press, device), press.get_stats()]


@case("padded batch")
def padded(device: str) -> Result:
    ids, mask = padded_tokens([90, 60])
    model, press = tiny_model("llama").to(device), MoERouterPress(0.5, experts=["knorm", "keydiff"])
    with press(model):
        return model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=4, do_sample=False)


@case("beam search")
def beams(device: str) -> Result:
    model, press = tiny_model("llama").to(device), MoERouterPress(0.5, experts=["keydiff"], budget="global")
    with press(model):
        return model.generate(tokens(90).to(device), max_new_tokens=4, do_sample=False, num_beams=3)


@case("cache to a file and back")
def files(device: str) -> Result:
    model = tiny_model("llama").to(device)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "book.kv"
        ids = tokens(90).to(device)
        save_cache(path, prefill(model, ids, MoERouterPress(0.5, experts=["keydiff"], budget="global")), model, ids)
        cache = load_cache(path, model).cache
    with torch.no_grad():
        positions = torch.arange(90, 93, device=device)[None]
        return model(tokens(3, seed=1).to(device), past_key_values=cache, position_ids=positions).logits


@case("what AdaKV masks, freed")
def masked(device: str) -> Result:
    model = tiny_model("llama").to(device)
    cache = RaggedCache.from_masked(
        model, prefill(model, tokens(90).to(device), AdaKVPress(ExpectedAttentionPress(0.5)))
    )
    with torch.no_grad():
        positions = torch.arange(90, 93, device=device)[None]
        return model(tokens(3, seed=1).to(device), past_key_values=cache, position_ids=positions).logits


@case("asked from the command line")
def command(device: str) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        tiny_model("llama").save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        arguments = ["ask", "-", "What?", "--model", directory, "--device", device, "--max-new-tokens", "4", "--json"]
        result = CliRunner().invoke(app, arguments, input="The council has promised an answer. " * 8)
    assert result.exit_code == 0, result.output
    return [row["answers"] for row in json.loads(result.stdout.splitlines()[-1])["methods"]]


@case("benchmark")
def benchmark(device: str) -> Result:
    methods = ("knorm", "adakv_snapkv", "keydiff", "moe_guide", "kvzip_global")
    plan = Plan(methods=methods, tasks=("needle_noise", "code"), ratios=(0.5,), lengths=(500,), limit=1, device=device)
    evaluator = Evaluator(plan, (tiny_model("llama").to(device), byte_tokenizer(chat=True)))
    with tempfile.TemporaryDirectory() as directory:
        run(plan, Path(directory), "bench", evaluator)
        return [[row[:-1] for row in record["results"]] for record in read_records(Path(directory))]


@case("speed")
def speed(device: str) -> Result:
    plan = SpeedPlan((128,), rounds=1, new_tokens=2)
    rows = measure(tiny_model("llama").to(device), None, plan)
    return [(row.what, row.name) for row in rows if "compiled" not in row.name]  # that is for a CPU


@case("training")
def training(device: str) -> Result:
    config = replace(CONFIG, end_to_end=1, samples=2, length=500, epochs=2, coded_share=1.0)
    with tempfile.TemporaryDirectory() as directory:
        routers, _ = train(tiny_model("llama").to(device), byte_tokenizer(chat=True), config, Path(directory))
    return list(routers.state_dict().values())


def home(value: Any) -> Any:
    """The same on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: home(item) for key, item in value.items()}
    if isinstance(value, str):
        return list(value.encode())
    return [home(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> bool:
    register()
    chosen = {name: function for name, function in CASES.items() if name.startswith(tuple(sys.argv[1:]) or "")}
    failed = not chosen
    for name, function in chosen.items():
        torch.manual_seed(0)
        expected = home(function("cpu"))
        try:
            with pretended_gpu():
                torch.manual_seed(0)
                got = home(function(NAME))
            assert_close(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)  # hit rates that nothing was seen of
        except Exception as error:
            failed = True
            print(f"{name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
            traceback.print_exc(limit=-8)
        else:
            print(f"{name}: as on the CPU", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
