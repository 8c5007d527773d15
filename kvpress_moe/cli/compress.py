"""kvpress-moe compress: prefill a text once and write its compressed cache to a file."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvpress_moe.cli.ask_tables import promise_of, say_promise
from kvpress_moe.cli.options import (
    AsJson,
    Budget,
    Confidence,
    Device,
    Experts,
    MaxBytes,
    MaxKL,
    Model,
    Precision,
    Ratio,
    Router,
    check_out_file,
    check_promise,
    check_settings,
    read_context,
)
from kvpress_moe.cli.progress import progress_bar
from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.model.context_length import check_length

EPILOG = """Examples:

kvpress-moe compress book.txt --ratio 0.75 --out book.kv

kvpress-moe compress book.txt --ratio 0.9 --precision mixed --out book.kv

kvpress-moe compress book.txt --max-kl 0.02 --precision mixed --out book.kv

kvpress-moe compress book.txt --experts expected_attention --budget global --out book.kv

kvpress-moe ask --cache book.kv "Who signed the lease?"
"""


def compress(
    command: typer.Context,
    text: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    ratio: Ratio = 0.5,
    experts: Experts = None,
    budget: Budget = None,
    router: Router = None,
    precision: Precision = None,
    max_kl: MaxKL = None,
    confidence: Confidence = 0.9,
    max_bytes: MaxBytes = None,
    model: Model = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compress the cache of a text and write it to a file. `ask --cache` then needs no prefill."""
    check_settings(ratio, budget, router)
    check_promise(command, max_kl, confidence, max_bytes, budget)
    menu = parse_precision(precision)
    check_out_file(out, "book.kv", text)
    context = read_context(text)
    with progress_bar() as step:
        step("importing", total=1)
        import torch
        from kvpress.pipeline import KVPressTextGenerationPipeline
        from transformers import DynamicCache

        from kvpress_moe.cache import save_cache
        from kvpress_moe.cache.prefill import cache_bytes
        from kvpress_moe.experts.registry import parse_experts
        from kvpress_moe.model.hooks import hooked
        from kvpress_moe.model.layers import language_model
        from kvpress_moe.model.loading import load_model
        from kvpress_moe.model.transformers_api import with_cache
        from kvpress_moe.press.moe_router_press import MoERouterPress

        press = MoERouterPress(
            ratio,
            experts=parse_experts(experts),
            budget=budget,
            router=router,
            precision=menu,
            max_kl=max_kl,
            confidence=confidence,
            max_bytes=max_bytes,
        )
        step("loading the model", total=1)
        loaded, tokenizer = load_model(model, device)
        press.post_init_from_model(loaded)  # refuses a promise that cannot be made before the text is read
        pipeline = KVPressTextGenerationPipeline(model=loaded, tokenizer=tokenizer)
        input_ids = pipeline.preprocess(context, [""], "", sys.maxsize)["context_ids"].to(device)
        check_length(loaded, input_ids.shape[1])

        layers = loaded.config.get_text_config().num_hidden_layers
        step("prefill", total=layers)
        cache, started = DynamicCache(), time.perf_counter()
        advance = partial(step, "prefill", advance=1)
        with torch.no_grad(), press(loaded), hooked(language_model(loaded).layers, lambda *_: advance()):
            pipeline.model.model(input_ids=input_ids, **with_cache(cache))
        prefill_seconds = time.perf_counter() - started
        save_cache(out, cache, loaded, input_ids, press)
    result = {
        "out": str(out),
        "context_tokens": input_ids.shape[1],
        "prefill_seconds": prefill_seconds,
        "cache_mib": cache_bytes(cache) / 2**20,
        "file_mib": out.stat().st_size / 2**20,
        **promise_of(press.get_stats()),
    }
    typer.echo(
        f"{result['context_tokens']} tokens prefilled in {prefill_seconds:.1f} s; cache {result['cache_mib']:.1f} MiB; "
        f"file {result['file_mib']:.1f} MiB: {out}",
        err=as_json,
    )
    if "promise" in result:
        typer.echo(say_promise(result["promise"], precision), err=as_json)
    if as_json:
        print(json.dumps(result, separators=(",", ":")))
