"""The class of all commands: it refuses text that is not UTF-8 before a command starts."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvpress_moe.errors import SettingError
from kvpress_moe.files import is_text

_SHOWN = {"text": "TEXT", "questions": "QUESTION", "question": "QUESTION", "runs": "RUNS"}


def check_arguments(context: Any) -> None:
    """Raise SettingError if an argument or an option is not UTF-8. Python keeps such bytes as lone surrogates."""
    for name, value in context.params.items():
        field = "QUESTION" if name == "text" and context.params.get("cache") is not None else _SHOWN.get(name, name)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if part is not None and not is_text(str(part)):
                remedy = "Rename the file." if field == "TEXT" else "Type it in a terminal that uses UTF-8."
                raise SettingError(field, str(part), "UTF-8", remedy)


def say_plainly(command: Any, context: Any, arguments: list[str], error: Any) -> Exception:
    """The error for a value that the parser of the command line cannot read, in the words of all other errors."""
    if error.param is None:
        return error  # type: ignore[no-any-return]
    name = error.param.name
    given = command.make_parser(context).parse_args(args=arguments)[0].get(name)
    if type(error).__name__ == "MissingParameter":
        return SettingError(
            _SHOWN.get(name, name), None, "a value", f"It is missing. See {context.command_path} --help."
        )
    kinds = {"integer": "a whole number", "number": "a number", "float": "a number"}
    expected = next((kind for word, kind in kinds.items() if word in str(error.message)), "a value")
    got = given if isinstance(given, str) else None
    return SettingError(_SHOWN.get(name, name), got, expected, f"See {context.command_path} --help.")


class _Checked:
    """A mixin for classes of typer."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except typer.BadParameter as error:
            raise say_plainly(self, ctx, given, error) from error

    def invoke(self, ctx: Any) -> Any:
        check_arguments(ctx)
        return super().invoke(ctx)  # type: ignore[misc]


class Command(_Checked, TyperCommand):
    """A command that checks its arguments."""


class Group(_Checked, TyperGroup):
    """The same for a command that has subcommands."""
