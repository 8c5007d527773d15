"""DocumentRequest: the body of a request for a new document, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpress_moe.serve.api_error import wrong
from kvpress_moe.serve.chat_request import text_of

LONGEST_TITLE = 200


@dataclass(frozen=True)
class DocumentRequest:
    """
    What a client sends.

    Attributes
    ----------
    text : str
    title : str
        At most ``LONGEST_TITLE`` characters.
    stream : bool
        Whether to tell the progress.
    """

    text: str
    title: str = ""
    stream: bool = False


def parse_document(body: Mapping[str, Any]) -> DocumentRequest:
    """
    Check the body of a new document.

    Raises
    ------
    APIError
        For the first field that is wrong or unknown.
    """
    for name in body:
        if name not in DocumentRequest.__dataclass_fields__:
            raise wrong(ascii(name)[1:-1][:80], body[name], "text, title or stream")
    given = {name: value for name, value in body.items() if value is not None}
    text, title, stream = given.get("text", "nothing"), given.get("title", ""), given.get("stream", False)
    if "text" not in given or not text_of("text", text).strip():
        raise wrong("text", text, "a text with something in it")
    if not isinstance(stream, bool):
        raise wrong("stream", stream, "true or false")
    return DocumentRequest(text, text_of("title", title)[:LONGEST_TITLE], stream)
