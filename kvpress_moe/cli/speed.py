"""kvpress-moe bench speed: the time that presses cost in the prefill and save in decoding."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.options import (
    Device,
    Model,
    check_between,
    check_number,
    check_out_directory,
    numbers,
    split_names,
)
from kvpress_moe.cli.progress import timed_bar

EPILOG = """Examples:

kvpress-moe bench speed --lengths 1024,4096 --out results/speed

kvpress-moe bench speed --model random --lengths 1024,4096,16384 --batches 1,8

kvpress-moe bench speed --model tiny --lengths 1024,2048,4096,8192,16384,32768 --presses "MoERouter (guide)"

kvpress-moe bench speed --model llama-8b --device cuda --lengths 8192,32768,131072 --longest 131072 --out results/gpu
"""


def speed(
    out: Annotated[Path, typer.Option(help="Directory of speed.json, speed.md and speed.png.")] = Path("runs/speed"),
    model: Model = None,
    device: Device = "cpu",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "1024,4096",
    batches: Annotated[str, typer.Option(help="Prompts per batch, separated by commas.")] = "1",
    ratio: Annotated[float, typer.Option(help="Share of the KV pairs that presses remove.")] = 0.75,
    rounds: Annotated[int, typer.Option(help="Measurements per method, after a warm-up.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded in each round.")] = 16,
    longest: Annotated[int, typer.Option(help="Skip batches with more tokens than this.")] = 65_536,
    presses: Annotated[str | None, typer.Option(help="Presses, separated by commas. Default: all.")] = None,
) -> None:
    """
    Measure prefill time, decoding time and peak memory with and without presses.

    Use the ratios, not the seconds. All methods of one length are measured in turns in one process, and their medians
    are compared. `--model random` is a small Llama with random weights; most of its time goes to attention.
    `--model tiny` is a smaller one with two layers, for long prompts. `--model llama-8b --device cuda` has the shape of
    Llama 3.1 8B, in bfloat16.
    """
    lengths_, batches_ = numbers("lengths", lengths, int), numbers("batches", batches, int)
    for length in lengths_:
        check_number("lengths", length, 128)
    for batch in batches_:
        check_number("batches", batch, 1)
    check_between("ratio", ratio)
    check_number("rounds", rounds, 1)
    check_number("new_tokens", new_tokens, 1)
    check_number("longest", longest, 1)
    check_out_directory(out)

    import torch

    from kvpress_moe import load_model
    from kvpress_moe.benchmark.random_models import RANDOM_MODELS
    from kvpress_moe.benchmark.speed import OURS, THEIRS, SpeedPlan, measure
    from kvpress_moe.errors import SettingError
    from kvpress_moe.files import write_atomically
    from kvpress_moe.report.speed_report import as_json, draw, growth, markdown

    plan = SpeedPlan(lengths_, batches_, ratio, rounds, new_tokens, longest)
    plan.check()
    known = OURS | THEIRS
    names = split_names("presses", presses) or tuple(known)
    for name in names:
        if name not in known:
            raise SettingError("presses", name, f"one of {', '.join(known)}", "")
    if model in RANDOM_MODELS:
        loaded, tokenizer = RANDOM_MODELS[model](max(plan.lengths) + plan.new_tokens, device), None
    else:
        loaded, tokenizer = load_model(model, device)
    with timed_bar() as step:
        rows = measure(
            loaded,
            tokenizer,
            plan,
            {name: known[name] for name in names},
            lambda done, all: step("settings", done, all),
        )
    about: dict[str, Any] = {
        "command": shlex.join(["kvpress-moe", *sys.argv[1:]]),
        "model": model or "SmolLM2-135M-Instruct",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": 0,
        "versions": {name: version(name) for name in ("kvpress-moe", "kvpress", "transformers", "torch")},
    }
    about["growth"] = {name: found for name in names if (found := growth(rows, name))}
    text = f"`{about['command']}`, {about['model']}, {about['threads']} threads\n\n" + markdown(rows)
    for name, found in about["growth"].items():
        fits = ", ".join(f"{what} to the power of {slope:.2f} (R² {r2:.3f})" for what, (slope, r2) in found.items())
        text += f"\n{name} grows with the prompt's length: {fits}.\n"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "speed.json", lambda path: path.write_text(json.dumps(as_json(rows, about), indent=1)))
    write_atomically(out / "speed.md", lambda path: path.write_text(text, encoding="utf-8"))
    draw(rows, out / "speed.png")
    print(text)
    ratios = {f"{row.name}, {row.tokens}×{row.batch}": round(row.ratio, 3) for row in rows if row.what == "prefill"}
    print(json.dumps({"out": str(out), "prefill": ratios}, separators=(",", ":"), ensure_ascii=False))
