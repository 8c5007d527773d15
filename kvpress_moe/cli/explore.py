"""kvpress-moe explore: show in a browser what the router keeps of a text."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.ask import BUILT_IN_QUESTION
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
    check_number,
    check_out_file,
    check_promise,
    check_settings,
    is_given,
    read_context,
)
from kvpress_moe.cli.progress import progress_bar
from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.errors import SettingError

EPILOG = """Examples:

kvpress-moe explore --ratio 0.75 --out page.html

kvpress-moe explore notes.txt --question "Who signed the lease?" --question "When?" --out notes.html

kvpress-moe explore --ratio 0.9 --precision mixed --out page.html

kvpress-moe explore --max-kl 0.02 --precision mixed --out page.html

kvpress-moe explore --serve
"""


def explore(
    command: typer.Context,
    text: Annotated[
        str | None,
        typer.Argument(help="A text file, or - for standard input. Default: a built-in text. Not with --serve."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Answered from the full and the compressed cache. Can be repeated.")
    ] = None,
    ratio: Ratio = 0.5,
    experts: Experts = None,
    budget: Budget = None,
    precision: Precision = None,
    max_kl: MaxKL = None,
    confidence: Confidence = 0.9,
    max_bytes: MaxBytes = None,
    router: Router = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file to write.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Start a web app on this machine; write no page.")] = False,
    port: Annotated[int, typer.Option(help="Port of --serve; 0: any free port.")] = 8720,
    model: Model = None,
    device: Device = "cpu",
    max_new_tokens: MaxNewTokens = 32,
    as_json: AsJson = False,
) -> None:
    """
    Write one HTML page that shows for each token how the experts scored it, and what becomes of it at any ratio.

    The page needs no network and no Python. It contains the scores, and the budget rule runs in the browser.
    """
    check_settings(ratio, budget, router, max_new_tokens)
    check_promise(command, max_kl, confidence, max_bytes, budget)
    menu = parse_precision(precision)
    if ratio == 0:
        raise SettingError(
            "ratio",
            ratio,
            "a number in (0, 1), the share of pairs (with a precision: of bytes) to remove",
            "At 0 no pair is scored. The slider of the page goes down to 0.",
        )
    check_number("port", port, 0, 65535, "0 takes any free port.")
    if serve:
        if text is not None or question or out is not None:
            raise SettingError("serve", True, "no TEXT, --question or --out with it", "Paste the text in the browser.")
        if as_json:
            raise SettingError("serve", True, "no --json with it", "The figures are in the browser.")
        if max_bytes is not None or is_given(command, "confidence"):
            raise SettingError("serve", True, "no --confidence or --max-bytes with it", "The form has no field for it.")
        settings: dict[str, Any] = {"ratio": ratio, "experts": experts, "budget": budget, "router": router}
        settings |= {"precision": precision, "max_kl": max_kl}
        run_app(port, settings, model, device, max_new_tokens)
        return
    out = check_out_file(out, "page.html", text)
    context = read_context(text)
    questions = question or ([BUILT_IN_QUESTION] if text is None else [])
    with progress_bar() as step:
        step("importing", total=1)
        from kvpress_moe.experts.registry import parse_experts
        from kvpress_moe.explore import explore as explored
        from kvpress_moe.explore import make_press, page, prefill_text
        from kvpress_moe.files import write_atomically
        from kvpress_moe.model.loading import load_model

        settings = {"compression_ratio": ratio, "experts": parse_experts(experts), "budget": budget, "router": router}
        promise = {"max_kl": max_kl, "confidence": confidence, "max_bytes": max_bytes}
        press = make_press({**settings, **promise, "precision": menu})
        step("loading the model", total=1)
        loaded, tokenizer = load_model(model, device)
        press.post_init_from_model(loaded)
        prefilled = prefill_text(loaded, tokenizer, context, questions, max_new_tokens, step)
        payload = explored(prefilled, press, step)
        write_atomically(out, lambda path: path.write_text(page(payload), encoding="utf-8"))
    result = {
        "out": str(out),
        "context_tokens": len(payload["tokens"]),
        "prefill_seconds": prefilled.seconds,
        "page_mib": out.stat().st_size / 2**20,
        **{name: payload["about"][name] for name in ("full_mib", "compressed_mib")},
    }
    typer.echo(
        f"{result['context_tokens']} tokens prefilled in {prefilled.seconds:.1f} s; page {result['page_mib']:.1f} MiB; "
        f"open it in a browser: {out}",
        err=as_json,
    )
    if as_json:
        print(json.dumps(result, separators=(",", ":")))


def run_app(port: int, settings: dict[str, Any], model: str | None, device: str, max_new_tokens: int) -> None:
    """Load the model, then serve the app until it is interrupted. The form first shows ``settings``."""
    with ExitStack() as stack:
        with progress_bar() as step:
            step("importing", total=1)
            from kvpress_moe.explore.jobs import JobRunner
            from kvpress_moe.explore.web_app import make_app
            from kvpress_moe.model.loading import load_model
            from kvpress_moe.serve.loopback import listen, run

            listening = stack.enter_context(closing(listen(port)))
            step("loading the model", total=1)
            runner = JobRunner(*load_model(model, device), max_new_tokens)
        app = make_app(runner, {"text": read_context(None), "question": BUILT_IN_QUESTION, **settings})
        run(app, listening, lambda address: typer.echo(f"{address} (Ctrl+C ends)"))
