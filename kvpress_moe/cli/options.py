"""Options and inputs that several commands share."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.errors import SettingError

Ratio = Annotated[float, typer.Option(help="Share of the KV pairs to remove, in [0, 1).")]
Experts = Annotated[
    str | None,
    typer.Option(
        help="guide, strong, or names, separated by commas. Default: the experts of the trained routers; without "
        "trained routers the four built-in window and attention experts."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="uniform: every head keeps the same number of pairs; layer: the heads of each layer share a budget; "
        "global: all heads share one budget. Default: global with trained routers, else uniform."
    ),
]
Router = Annotated[
    str | None,
    typer.Option(help="Trained routers: a directory or a hub id. Default: those in the package for the model."),
]
Model = Annotated[str | None, typer.Option(help="Hub id or directory. Default: SmolLM2-135M-Instruct.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]


def read_context(text: str | None) -> str:
    """The text to prefill: the built-in text, standard input, or a file."""
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


def split_names(names: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` -> ``("a", "b")``."""
    return None if names is None else tuple(name.strip() for name in names.split(",") if name.strip())


def numbers(field: str, text: str, kind: type) -> tuple[Any, ...]:
    """``"0.5,0.9"`` -> ``(0.5, 0.9)``."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(
            field, text, "numbers separated by commas", "For example --ratios 0.5,0.9 or --lengths 1024,4096."
        ) from error
