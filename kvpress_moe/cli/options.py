"""Options and inputs that several commands share."""

from __future__ import annotations

import math
import os
import stat
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.errors import SettingError
from kvpress_moe.files import file_to_write

Ratio = Annotated[
    float,
    typer.Option(
        help="Share of the KV pairs to remove, in [0, 1). With --precision: share of the bytes of the cache in the "
        "model's own type."
    ),
]
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
Precision = Annotated[
    str | None,
    typer.Option(
        help="mixed: every pair gets its own number of bits; or a menu such as k8v4 or k8v4,k4v2 (bits of keys and "
        "values; 16: as the model wrote them). --ratio is then a share of the bytes. Default: pairs are not coded."
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        help="Name the quality instead of the size: keep as little as the mean KL divergence from the full cache's "
        "answers allows, in nats, for example 0.02. Not with a size.",
    ),
]
Confidence = Annotated[
    float,
    typer.Option(help="With --max-kl: share of the prompts like those of the calibration that stay within the bound."),
]
MaxBytes = Annotated[
    int | None, typer.Option(help="With --max-kl: largest number of bytes of the cache, if it had 16 bits.")
]
Router = Annotated[
    str | None,
    typer.Option(help="Trained routers: a directory or a hub id. Default: those in the package for the model."),
]
Model = Annotated[str | None, typer.Option(help="Hub id or directory. Default: SmolLM2-135M-Instruct.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens; at least 1.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON line with all figures. Everything else goes to standard error.")
]


def read_context(text: str | None) -> str:
    """The text to prefill: the built-in text, standard input, or a file."""
    if text is None:
        return files("kvpress_moe").joinpath("data/harbour.txt").read_text(encoding="utf-8")
    try:
        if text == "-" and sys.stdin is None:
            raise OSError("standard input is closed")
        data = sys.stdin.buffer.read() if text == "-" else Path(text).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be a file's
        raise SettingError(
            "TEXT", text, "a readable UTF-8 text file, or -", f"{type(error).__name__}: {error}"
        ) from error
    try:
        context = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SettingError(
            "TEXT", text, "text in UTF-8", f"Byte {error.start + 1} is not UTF-8. Convert the text, e.g. with iconv."
        ) from error
    if not context.strip():
        raise SettingError("TEXT", text, "a text with something in it", "It is empty.")
    return context


def check_settings(ratio: float, budget: str | None, router: str | None, max_new_tokens: int = 1) -> None:
    """
    Check settings of the press and the length of answers before torch is imported.

    The press checks its settings again, with the same words. It cannot be imported without torch.

    Raises
    ------
    SettingError
    """
    if not 0 <= ratio < 1:
        raise SettingError(
            "compression_ratio",
            ratio,
            "a number in [0, 1), the share of pairs (with a precision: of bytes) to remove, or None",
            "0.5 keeps half. With None, each expert's own keep fraction decides.",
        )
    if budget not in (None, "uniform", "layer", "global"):
        raise SettingError("budget", budget, "'uniform' or 'layer' or 'global'", "None chooses by the routers.")
    if router == "":
        raise SettingError(
            "router",
            router,
            "a directory, a hub id, a Routers object or None",
            "None takes the routers that ship for the model, else untrained ones.",
        )
    check_number("max_new_tokens", max_new_tokens, 1, remedy="The default is 32.")


def check_promise(
    command: typer.Context, max_kl: float | None, confidence: float, max_bytes: int | None, budget: str | None
) -> None:
    """
    Check the settings of a promise before torch is imported. The press checks them again, with the same words.

    Raises
    ------
    SettingError
    """
    if max_kl is None:
        if is_given(command, "confidence"):
            raise SettingError("confidence", confidence, "none without --max-kl", "Add --max-kl 0.02, or leave it out.")
        if max_bytes is not None:
            raise SettingError(
                "max_bytes", max_bytes, "None without max_kl", "Set max_kl, or choose the size with compression_ratio."
            )
        return
    if not (0 < max_kl < math.inf):
        raise SettingError(
            "max_kl",
            max_kl,
            "a finite number above 0, the largest mean KL divergence in nats, or None",
            "For example 0.02. None: compression_ratio decides.",
        )
    if not 0 < confidence < 1:
        raise SettingError(
            "confidence", confidence, "a number between 0 and 1", "0.9: nine prompts of ten stay within max_kl."
        )
    if is_given(command, "ratio"):
        raise SettingError(
            "ratio", "--ratio", "no --ratio with --max-kl, which decides how much each prompt keeps", "Leave one out."
        )
    if budget not in (None, "global"):
        raise SettingError(
            "budget",
            budget,
            "'global' or None with max_kl",
            "The estimate of the KL divergence is made for a budget that all heads share.",
        )
    check_number("max_bytes", max_bytes, 1)


def check_number(field: str, value: float | None, low: float, high: float = math.inf, remedy: str = "") -> None:
    """Raise SettingError unless a number is in ``[low, high]``. ``None`` means that the option was not given."""
    if value is not None and not low <= value <= high:
        expected = f"a number, at least {low}" if high == math.inf else f"a number from {low} to {high}"
        raise SettingError(field, value, expected, remedy or f"See the default with --help: --{dashed(field)}.")


def check_between(field: str, value: float) -> None:
    """Raise SettingError unless a share is between 0 and 1, without both ends."""
    if not 0 < value < 1:
        raise SettingError(field, value, "a number between 0 and 1", f"For example --{dashed(field)} 0.25.")


def dashed(field: str) -> str:
    """``"max_new_tokens"`` -> ``"max-new-tokens"``."""
    return field.replace("_", "-")


def check_out_file(out: Path | None, example: str, text: str | None = None) -> Path:
    """
    Return ``out``. Raise SettingError unless it is a regular file or a new name, in a directory to write into.

    It must not be the file ``text`` either, which is read.
    """
    expected = "a file in a directory that exists"
    if out is None:
        raise SettingError("out", None, expected, f"For example --out {example}.")
    try:
        target = file_to_write(out)
    except OSError as error:
        raise SettingError(
            "out", str(out), f"{expected}, or a new one", f"{_reason(error)}. Choose another."
        ) from error
    if not target.parent.is_dir():
        raise SettingError("out", str(out), expected, f"Make the directory {target.parent} first.")
    if text is not None and target.exists() and os.path.exists(text) and target.samefile(text):
        raise SettingError("out", str(out), "another file than TEXT", f"For example --out {example}.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise SettingError("out", str(out), expected, f"The directory {target.parent} cannot be written.")
    return out


def check_out_directory(out: Path, field: str = "out") -> None:
    """Raise SettingError unless ``out`` is a directory that can be written, or can be made."""
    expected = "a directory that can be written, or a new name"
    for place in (out, *out.parents):
        try:
            found = place.stat()
        except FileNotFoundError as error:
            if not place.is_symlink():
                continue  # can be made, if what is above it is a directory
            raise SettingError(field, str(out), expected, f"{place} is a link to nothing. Choose another.") from error
        except OSError as error:
            raise SettingError(field, str(out), expected, f"{_reason(error)}. Choose another.") from error
        if not stat.S_ISDIR(found.st_mode):
            raise SettingError(field, str(out), expected, f"{place} is not a directory. Choose another.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise SettingError(field, str(out), expected, f"{place} cannot be written. Choose another.")
        return


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].upper() + text[1:]


def split_names(field: str, names: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` -> ``("a", "b")``. Raises SettingError if there is no name."""
    if names is None:
        return None
    split = tuple(name.strip() for name in names.split(",") if name.strip())
    if not split:
        raise SettingError(field, names, "names separated by commas", f"Without --{dashed(field)} the default applies.")
    return split


def numbers(field: str, text: str, kind: type) -> tuple[Any, ...]:
    """``"0.5,0.9"`` -> ``(0.5, 0.9)``."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(
            field, text, "numbers separated by commas", "For example --ratios 0.5,0.9 or --lengths 1024,4096."
        ) from error


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given by the user."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")
