"""kvpress-moe ask: prefill one text once and answer questions from each cache, or answer from a cache file."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Annotated, Any

import typer

from kvpress_moe.cli.ask_tables import promise_of, show, show_answers
from kvpress_moe.cli.options import (
    AsJson,
    Budget,
    Confidence,
    Device,
    Experts,
    MaxBytes,
    MaxKL,
    MaxNewTokens,
    Model,
    Precision,
    Ratio,
    Router,
    check_promise,
    check_settings,
    dashed,
    is_given,
    read_context,
)
from kvpress_moe.cli.progress import progress_bar
from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.errors import SettingError
from kvpress_moe.model.context_length import check_length

BUILT_IN_QUESTION = "What is the code of the old safe in the lighthouse?"

EPILOG = """Examples:

kvpress-moe ask --experts strong --ratio 0.75

kvpress-moe ask notes.txt "Who signed the lease?" "When?"

cat notes.txt | kvpress-moe ask - "Who signed?"

kvpress-moe ask --ratio 0.9 --precision mixed

kvpress-moe ask --max-kl 0.02 --precision mixed

kvpress-moe ask --cache book.kv "Who signed?"
"""


def ask(
    context: typer.Context,
    text: Annotated[
        str | None,
        typer.Argument(
            help="A text file, or - for standard input. Default: a built-in text. With --cache, this is a question."
        ),
    ] = None,
    questions: Annotated[list[str] | None, typer.Argument(help="One or more questions about the text.")] = None,
    ratio: Ratio = 0.5,
    experts: Experts = None,
    budget: Budget = None,
    router: Router = None,
    precision: Precision = None,
    max_kl: MaxKL = None,
    confidence: Confidence = 0.9,
    max_bytes: MaxBytes = None,
    cache: Annotated[str | None, typer.Option(help="Answer from a cache file that `compress` wrote.")] = None,
    model: Model = None,
    device: Device = "cpu",
    max_new_tokens: MaxNewTokens = 32,
    layers: Annotated[bool, typer.Option("--layers", help="Show the experts layer by layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Answer questions about a text from the full cache, the router's cache, and the cache of each expert alone.

    The text is prefilled once. Every method compresses a copy of that cache, with the same budget, before it sees the
    question.
    """
    from rich.console import Console

    check_settings(ratio, budget, router, max_new_tokens)
    if cache is None:
        check_promise(context, max_kl, confidence, max_bytes, budget)
    menu = parse_precision(precision)
    console = Console(stderr=as_json)
    if cache is not None:
        refuse_recipe(context)
        asked = [question for question in (text, *(questions or [])) if question is not None]
        require_questions(asked)
        with progress_bar() as step:
            result = run_cache(cache, asked, model, device, max_new_tokens, step, router)
        show_answers(result, console)
    else:
        read, questions = read_context(text), questions or ([BUILT_IN_QUESTION] if text is None else [])
        require_questions(questions)
        with progress_bar() as step:
            step("importing", total=1)
            from kvpress_moe.experts.registry import parse_experts

            settings = {
                "compression_ratio": ratio,
                "experts": parse_experts(experts),
                "budget": budget,
                "router": router,
                "precision": menu,
                "max_kl": max_kl,
                "confidence": confidence,
                "max_bytes": max_bytes,
            }
            result = run(read, questions, settings, model, device, max_new_tokens, step)
        show(result, layers, console)
    if as_json:
        from kvpress_moe.benchmark.records import rounded

        result = rounded(result, digits=None)  # NaN becomes null
        print(json.dumps(result, separators=(",", ":"), allow_nan=False, default=str))


def refuse_recipe(context: typer.Context) -> None:
    """Raise SettingError if an option that says how to compress was given, together with a cache that is compressed."""
    for name, what in {
        "ratio": "ratio is",
        "experts": "experts are",
        "budget": "budget is",
        "precision": "precision is",
        "max_kl": "promise is",
        "confidence": "promise is",
        "max_bytes": "promise is",
    }.items():
        if is_given(context, name):
            raise SettingError(
                name,
                context.params[name],
                f"no --{dashed(name)} with --cache",
                f"The {what} the cache's. For another one, compress the text again.",
            )
    if is_given(context, "layers"):
        raise SettingError(
            "layers",
            True,
            "no --layers with --cache",
            "The experts were at work when the cache was made. To see them, compress the text again: "
            "kvpress-moe ask TEXT QUESTION --layers.",
        )


def require_questions(questions: list[str]) -> None:
    """Raise SettingError if there is no question."""
    if not any(question.strip() for question in questions):
        raise SettingError("QUESTION", None, "at least one question about the text", "Add it as the last argument.")


def run(
    context: str,
    questions: list[str],
    settings: dict[str, Any],
    model_name: str | None,
    device: str,
    max_new_tokens: int,
    step: Any,
) -> dict[str, Any]:
    """
    Prefill a text once and answer the questions from every cache. Returns all figures as plain data.

    Parameters
    ----------
    context, questions : str, list of str
    settings : dict
        Settings of the press. The single experts get the same settings, except ``router``.
    step : callable
        ``step(description, total, advance)`` reports progress.
    """
    from kvpress.pipeline import KVPressTextGenerationPipeline

    from kvpress_moe.cache.answering import answer_each
    from kvpress_moe.cache.prefill import Prefill, cache_bytes
    from kvpress_moe.model.loading import load_model
    from kvpress_moe.press.moe_router_press import MoERouterPress

    press = MoERouterPress(**settings)
    step("loading the model", total=1)
    model, tokenizer = load_model(model_name, device)
    press.post_init_from_model(model)  # trained routers may bring their own experts
    names = list(press.expert_strategies.values())
    alone = [name for name in names if name != "learned"]  # it is a part of its router
    of_promise = dict.fromkeys(("max_kl", "max_bytes"))
    singles = [MoERouterPress(**{**settings, **of_promise, "router": None, "experts": [name]}) for name in alone]
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    tokens = pipeline.preprocess(context, questions, "", sys.maxsize)
    context_ids = tokens["context_ids"]
    check_length(model, context_ids.shape[1], max(q.shape[1] for q in tokens["questions_ids"]), max_new_tokens)

    step("prefill", total=model.config.get_text_config().num_hidden_layers)
    started = time.perf_counter()
    prefill = Prefill(model, context_ids, on_layer=lambda: step("prefill", advance=1))
    prefill_seconds = time.perf_counter() - started

    methods = [
        ("full cache", None),
        ("router", press),
        *((f"only {n}", p) for n, p in zip(alone, singles, strict=True)),
    ]
    step("asking", total=len(methods) * len(questions))
    rows: list[dict[str, Any]] = []
    full_bytes = cache_bytes(prefill.cache)
    promise: dict[str, Any] = {}
    for name, method in methods:
        started = time.perf_counter()
        if method in singles and promise:  # the size that the router chose
            method.compression_ratio = max(0.0, 1 - rows[1]["kept_share"])
        cache = prefill.compress(method)
        promise = promise or (promise_of(press.get_stats()) if method is press else {})
        row = {"method": name, "compression_seconds": time.perf_counter() - started if method else 0.0}
        row |= {"mib": cache_bytes(cache) / 2**20, "kept_share": cache_bytes(cache) / full_bytes}
        advance = partial(step, f"asking: {name}", advance=1)
        started = time.perf_counter()
        answers = answer_each(
            pipeline, cache, tokens["questions_ids"], context_ids.shape[1], max_new_tokens, on_answer=advance
        )
        row["answer_seconds"] = time.perf_counter() - started
        row["answers"] = [" ".join(answer.split()) for answer in answers]
        rows.append(row)
    layers = press.get_stats()["layer_stats"]
    return {
        "model": model.config.name_or_path,
        "device": device,
        "num_hidden_layers": model.config.get_text_config().num_hidden_layers,
        "context_tokens": context_ids.shape[1],
        **{name: value for name, value in settings.items() if name in ("compression_ratio", "budget", "precision")},
        **({"compression_ratio": None} if promise else {}),
        "questions": questions,
        "prefill_seconds": prefill_seconds,
        **promise,
        "methods": rows,
        "strategies": totals([stats.get("strategy_stats", {}) for stats in layers.values()]),
        "experts": names,
        "top_k": press.top_k,
        "expert_usage_ratios": {layer: stats["router_stats"]["expert_usage_ratios"] for layer, stats in layers.items()},
        "cache_hit_rates": {layer: s["expert_compression_stats"]["cache_hit_rates"] for layer, s in layers.items()},
    }


def totals(by_layer: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Strategy -> ``pairs`` and ``bytes`` of all layers. Empty without a precision."""
    found: dict[str, dict[str, float]] = {}
    for layer in by_layer:
        for name, counts in layer.items():
            of_all = found.setdefault(name, {"pairs": 0, "bytes": 0})
            of_all["pairs"] += counts["pairs"]
            of_all["bytes"] += counts["bytes"]
    return found


def run_cache(
    path: str,
    questions: list[str],
    model_name: str | None,
    device: str,
    max_new_tokens: int,
    step: Any,
    router: str | None = None,
) -> dict[str, Any]:
    """
    Answer questions from a cache file. Returns all figures as plain data.

    ``router`` is the directory of the key transforms that the cache was coded with, if the package does not hold them.
    """
    step("importing", total=1)
    from kvpress.pipeline import KVPressTextGenerationPipeline

    from kvpress_moe.cache import load_cache
    from kvpress_moe.cache.answering import answer_each
    from kvpress_moe.cache.prefill import cache_bytes
    from kvpress_moe.model.loading import load_model

    step("loading the model", total=1)
    model, tokenizer = load_model(model_name, device)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    started = time.perf_counter()
    saved = load_cache(path, model, router)
    load_seconds = time.perf_counter() - started
    question_ids = pipeline.preprocess("", questions, "", sys.maxsize)["questions_ids"]
    check_length(model, saved.n_tokens, max(ids.shape[1] for ids in question_ids), max_new_tokens)
    step("asking", total=len(questions))
    started = time.perf_counter()
    advance = partial(step, "asking", advance=1)
    answers = answer_each(pipeline, saved.cache, question_ids, saved.n_tokens, max_new_tokens, on_answer=advance)
    return {
        "model": model.config.name_or_path,
        "device": device,
        "context_tokens": saved.n_tokens,
        "recipe": saved.recipe,
        "mib": cache_bytes(saved.cache) / 2**20,
        "load_seconds": load_seconds,
        "answer_seconds": time.perf_counter() - started,
        "questions": questions,
        "answers": [" ".join(answer.split()) for answer in answers],
    }
