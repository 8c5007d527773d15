"""kvpress-moe ask: one text, one prefill, the answers that each cache gives."""

from __future__ import annotations

import json
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress_moe.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN_QUESTION = "What is the code of the old safe in the lighthouse?"

EPILOG = """Examples:

kvpress-moe ask --experts strong --ratio 0.75

kvpress-moe ask notes.txt "Who signed the lease?" "When?"

cat notes.txt | kvpress-moe ask - "Who signed?"

kvpress-moe ask --experts keydiff,leverage,selective"""


def ask(
    text: Annotated[str | None, typer.Argument(help="A text file, or - for standard input; a built-in text.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(help="One or more questions about the text.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the KV pairs to remove, in [0, 1).")] = 0.5,
    experts: Annotated[
        str | None, typer.Option(help="guide, strong, or names separated by commas; the guide's first four.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="Trained routers: a directory or a hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or directory; SmolLM2-135M-Instruct.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line that holds all figures.")] = False,
) -> None:
    """
    Ask about a text with the full cache, with the router's cache, and with each expert's alone at the same budget.

    The text is prefilled once; every method compresses a copy of that cache before it sees the question.
    """
    context, questions = read_context(text), questions or ([BUILT_IN_QUESTION] if text is None else [])
    if not questions:
        raise SettingError("QUESTION", None, "at least one question about the text", "Add it behind the file's name.")

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1)

        def step(description: str, total: int | None = None, advance: int = 0) -> None:
            progress.update(task, description=description, advance=advance)
            if total is not None:
                progress.reset(task, total=total, description=description)

        result = run(context, questions, ratio, parse_experts(experts), router, model, device, max_new_tokens, step)
    show(result, console)
    if as_json:
        print(json.dumps(result, separators=(",", ":")))


def read_context(text: str | None) -> str:
    """The text to ask about: built in, from standard input, or from a file."""
    if text is None:
        return files("kvpress_moe").joinpath("data/harbour.txt").read_text(encoding="utf-8")
    try:
        context = sys.stdin.read() if text == "-" else Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            "TEXT", text, "a readable UTF-8 text file, or -", f"{type(error).__name__}: {error}"
        ) from error
    if not context.strip():
        raise SettingError("TEXT", text, "a text with something in it", "The file is empty.")
    return context


def parse_experts(experts: str | None) -> str | list[str] | None:
    """``"guide"`` stays a set's name; ``"knorm,tova"`` becomes a list."""
    if experts is None or experts in ("guide", "strong"):
        return experts
    return [name.strip() for name in experts.split(",")]


def run(
    context: str,
    questions: list[str],
    ratio: float,
    experts: str | list[str] | None,
    router: str | None,
    model_name: str | None,
    device: str,
    max_new_tokens: int,
    step: Any,
) -> dict[str, Any]:
    """Do the work of the command, return all figures as plain data; ``step(description, total, advance)`` reports."""
    step("importing", total=1)
    from kvpress.pipeline import KVPressTextGenerationPipeline

    from kvpress_moe.models import load_model
    from kvpress_moe.prefill import Prefill, cache_bytes
    from kvpress_moe.press import MoERouterPress

    press = MoERouterPress(compression_ratio=ratio, experts=experts, router=router)
    names = list(press.expert_strategies.values())
    singles = [MoERouterPress(compression_ratio=ratio, experts=[name]) for name in names]

    step("loading the model", total=1)
    model, tokenizer = load_model(model_name, device)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    tokens = pipeline.preprocess(context, questions, "", sys.maxsize)
    context_ids = tokens["context_ids"]
    check_length(
        model, tokenizer, context_ids.shape[1], max(q.shape[1] for q in tokens["questions_ids"]), max_new_tokens
    )

    step("prefill", total=model.config.get_text_config().num_hidden_layers)
    started = time.perf_counter()
    prefill = Prefill(model, context_ids, on_layer=lambda: step("prefill", advance=1))
    prefill_seconds = time.perf_counter() - started

    methods = [
        ("full cache", None),
        ("router", press),
        *((f"only {n}", p) for n, p in zip(names, singles, strict=True)),
    ]
    step("asking", total=len(methods) * len(questions))
    rows = []
    for name, method in methods:
        started = time.perf_counter()
        cache = prefill.compress(method)
        row = {"method": name, "compression_seconds": time.perf_counter() - started if method else 0.0}
        row |= {"mib": cache_bytes(cache) / 2**20, "pairs_per_head": cache.get_seq_length(), "answers": []}
        lengths = [cache.get_seq_length(layer_idx) for layer_idx in range(len(cache))]
        started = time.perf_counter()
        for question_ids in tokens["questions_ids"]:
            answer = pipeline.generate_answer(question_ids, cache, context_ids.shape[1], max_new_tokens)
            pipeline._remove_answer_from_cache(cache, lengths)
            row["answers"].append(" ".join(answer.split()))
            step(f"asking: {name}", advance=1)
        row["answer_seconds"] = time.perf_counter() - started
        rows.append(row)
    layers = press.get_stats()["layer_stats"] if ratio else {}
    return {
        "model": model.config.name_or_path,
        "device": device,
        "context_tokens": context_ids.shape[1],
        "compression_ratio": ratio,
        "questions": questions,
        "prefill_seconds": prefill_seconds,
        "methods": rows,
        "experts": names,
        "expert_usage_ratios": {layer: stats["router_stats"]["expert_usage_ratios"] for layer, stats in layers.items()},
        "cache_hit_rates": {layer: s["expert_compression_stats"]["cache_hit_rates"] for layer, s in layers.items()},
    }


def check_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_context: int, n_question: int, n_answer: int
) -> None:
    """Raise if text, question and answer together are longer than the model takes."""
    limit = model.config.get_text_config().max_position_embeddings
    if n_context + n_question + n_answer > limit:
        raise SettingError(
            "TEXT",
            f"{n_context} tokens",
            f"at most {limit - n_question - n_answer}, so that question and answer fit into the model's {limit}",
            "Shorten the text, or name another --model.",
        )


def show(result: dict[str, Any], console: Any) -> None:
    """Print the result: a line about the run, the answers, and who judged in which layer."""
    from rich.table import Table

    full = result["methods"][0]
    console.print(
        f"[bold]{result['context_tokens']}[/] tokens, prefilled once in [bold]{result['prefill_seconds']:.1f} s[/] on "
        f"{result['device']}; {result['compression_ratio']:.0%} of the pairs removed, cache "
        f"[bold]{full['mib']:.1f}[/] → [bold]{result['methods'][1]['mib']:.1f} MiB[/]",
        highlight=False,
    )
    for number, question in enumerate(result["questions"]):
        table = Table(title=question, title_justify="left", title_style="bold", show_lines=False)
        table.add_column("cache")
        table.add_column("answer", ratio=1)
        for heading in ("MiB", "compress s", "answer s"):
            table.add_column(heading, justify="right")
        for row in result["methods"]:
            table.add_row(
                row["method"],
                row["answers"][number],
                f"{row['mib']:.1f}",
                f"{row['compression_seconds']:.2f}" if row is not full else "–",
                f"{row['answer_seconds'] / len(result['questions']):.2f}",
                style="bold" if row["method"] == "router" else None,
            )
        console.print(table)
    if result["expert_usage_ratios"]:
        table = Table(title="Who judged: share of the routing / hit rate", title_justify="left", title_style="bold")
        table.add_column("layer", justify="right")
        for name in result["experts"]:
            table.add_column(name, justify="right")
        for layer, shares in result["expert_usage_ratios"].items():
            rates = result["cache_hit_rates"][layer]
            table.add_row(str(layer), *(f"{s:.0%} / {r:.2f}" for s, r in zip(shares, rates, strict=True)))
        console.print(table)
