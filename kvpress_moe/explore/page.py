"""The explorer as one self-contained HTML page. It contains data, style and program, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

PROGRAM = (
    "unpack.js",
    "budget.js",
    "view.js",
    "bytes.js",
    "text.js",
    "panels.js",
    "promise.js",
    "main.js",
)  # each file uses the ones before it
STYLE = ("colours.css", "page.css")


def page(payload: dict[str, Any]) -> str:
    """
    The HTML text of the page.

    Everything that comes from a text, a model or an answer is only in the JSON block. The program inserts it with
    ``textContent``. Scripts and styles run only if their hash is in the page's Content-Security-Policy.
    """
    style, program = assets(*STYLE), assets(*PROGRAM)
    replacements = {"{{policy}}": policy(style, program), "{{style}}": style, "{{program}}": program}
    text = asset("page.html")
    for place, content in replacements.items():
        text = text.replace(place, content)
    return text.replace("{{payload}}", as_json(payload))  # last, so that nothing in it is replaced


def policy(style: str, program: str) -> str:
    """A Content-Security-Policy that allows only this style and this program, and no requests."""
    return (
        f"default-src 'none'; script-src '{_hash(program)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_json(data: Any) -> str:
    """JSON that can stand inside a script element: it has no ``<`` that could end the element or start another."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def assets(*names: str) -> str:
    """The texts of asset files, one after the other."""
    return "\n".join(asset(name) for name in names)


def asset(name: str) -> str:
    """The text of a file in the package's ``assets``."""
    return files("kvpress_moe.explore").joinpath("assets", name).read_text(encoding="utf-8")
