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
        help="guide, strong, or names separated by commas; those of the trained routers, else the guide's first four."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(help="Who shares: uniform (nobody), layer (its heads), global (all); global with trained routers."),
]
Router = Annotated[str | None, typer.Option(help="Trained routers: a directory or a hub id.")]
Model = Annotated[str | None, typer.Option(help="Hub id or directory; SmolLM2-135M-Instruct.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]


def read_context(text: str | None) -> str:
    """The text to read: built in, from standard input, or from a file."""
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
        raise SettingError(field, text, "numbers separated by commas", f"For example --{field} 0.5,0.9.") from error
