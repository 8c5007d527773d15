"""ChatRequest: the body of a chat completion, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpress_moe.serve.api_error import APIError, wrong

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 1000
MOST_STOPS = 4
LONGEST_STOP = 200

#: Fields of OpenAI's API that change nothing here, or whose only value that can be served is given.
_ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "user": lambda value: isinstance(value, str),
    "metadata": lambda value: isinstance(value, dict),
    "store": lambda value: isinstance(value, bool),
    "logprobs": lambda value: value is False,
    "frequency_penalty": lambda value: value == 0,
    "presence_penalty": lambda value: value == 0,
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "service_tier": lambda value: isinstance(value, str),
    "prompt_cache_key": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
}


@dataclass(frozen=True)
class ChatRequest:
    """
    What a client asks for.

    Attributes
    ----------
    model : str
    messages : tuple of dict
        Each with ``role`` and ``content``, both texts.
    documents : tuple of str
        Ids of compressed documents that the chat is about.
    stream, include_usage : bool
    max_tokens : int or None
    temperature, top_p : float
    stop : tuple of str
    seed : int or None
    """

    model: str
    messages: tuple[dict[str, str], ...]
    documents: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


def parse_body(body: bytes) -> dict[str, Any]:
    """
    A JSON object from a request's body.

    Raises
    ------
    APIError
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"body: got no JSON ({type(error).__name__}), expected a JSON object.") from error
    if not isinstance(data, dict):
        raise APIError(400, f"body: got {type(data).__name__}, expected a JSON object.")
    return data


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """
    Check a chat completion's body.

    Raises
    ------
    APIError
        For the first field that is wrong or unknown. Nothing is guessed or left out.
    """
    given = {name: value for name, value in body.items() if value is not None}
    known = {*_READERS, *_ACCEPTED, "model", "messages", "max_completion_tokens", "stream_options"}
    for name in given:
        if name not in known:
            shown = ascii(name)[1:-1][:80]
            raise wrong(shown, given[name], "a field that this server knows", f"It knows {', '.join(sorted(known))}.")
    for name, is_served in _ACCEPTED.items():
        if name in given and not is_served(given[name]):
            raise wrong(name, given[name], "a value that this server can serve", "Leave it out.")
    if not isinstance(given.get("model"), str):
        raise wrong("model", given.get("model"), "the name of a model", "GET /v1/models lists it.")
    fields = {name: read(given[name]) for name, read in _READERS.items() if name in given}
    if "max_completion_tokens" in given:
        fields["max_tokens"] = _whole("max_completion_tokens", 1)(given["max_completion_tokens"])
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise wrong("stream_options", options, "an object with include_usage, true or false")
    return ChatRequest(
        given["model"],
        _messages(given.get("messages")),
        include_usage=bool(options.get("include_usage", False)),
        **fields,
    )


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong("messages", value, f"a list of 1 to {MOST_MESSAGES} messages")
    return tuple(_message(message, number) for number, message in enumerate(value))


def _message(message: Any, number: int) -> dict[str, str]:
    field = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise wrong(f"{field}.role", message, f"an object with role, one of {', '.join(ROLES)}, and content")
    content = message.get("content")
    if isinstance(content, list):  # parts, as some clients send them
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise wrong(f"{field}.content", content, "a text, or parts of type text", "Pictures cannot be read.")
        content = "".join(_text(f"{field}.content", part.get("text")) for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _text(f"{field}.content", content)}


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(field, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # one half of a surrogate pair
        raise wrong(field, "text", "a text in Unicode", "It has half of a surrogate pair.") from error
    return value


def _whole(field: str, low: int, high: int = 2**63 - 1) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise wrong(field, type(value).__name__ if type(value) is int else value, f"a whole number from {low} on")
        return value

    return read


def _number(field: str, low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # nor NaN
            raise wrong(field, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not right or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        expected = f"a text, or a list of at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters"
        raise wrong("stop", value, expected)
    return tuple(_text("stop", stop) for stop in stops)


def _documents(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise wrong("documents", value, "a list of ids of documents", "GET /v1/documents lists them.")
    return tuple(value)


def _switch(field: str) -> Callable[[Any], bool]:
    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise wrong(field, value, "true or false")
        return value

    return read


_READERS: dict[str, Callable[[Any], Any]] = {
    "documents": _documents,
    "stream": _switch("stream"),
    "max_tokens": _whole("max_tokens", 1),
    "temperature": _number("temperature", 0, 2),
    "top_p": _number("top_p", 0, 1),
    "stop": _stop,
    "seed": _whole("seed", -(2**63)),
}
