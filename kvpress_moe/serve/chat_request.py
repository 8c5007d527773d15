"""ChatRequest: the body of a chat completion, checked field by field."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kvpress_moe.serve.api_error import APIError, wrong

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 1000
MOST_STOPS = 4
LONGEST_STOP = 200
HIGHEST_WHOLE = 2**63 - 1
LOWEST_SEED = -(2**63)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _equals(number: int) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value == number  # true is no number


def _never(value: Any) -> bool:
    return False


#: Fields of OpenAI's API that cannot be served. They may be null, as some clients send them.
UNSERVED = (
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "top_logprobs",
    "audio",
    "prediction",
    "web_search_options",
    "moderation",
)
#: Fields that change nothing here, or have values that would change something and cannot be served.
_ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "n": _equals(1),
    "logprobs": lambda value: value is False,
    "logit_bias": lambda value: value == {},
    "frequency_penalty": _equals(0),
    "presence_penalty": _equals(0),
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "reasoning_effort": lambda value: value == "none",
    "verbosity": lambda value: value == "medium",
    "parallel_tool_calls": _is(bool),
    "store": _is(bool),
    "metadata": _is(dict),
    "user": _is(str),
    "service_tier": _is(str),
    "safety_identifier": _is(str),
    "prompt_cache_key": _is(str),
    "prompt_cache_retention": _is(str),
    "prompt_cache_options": _is(dict),
    **dict.fromkeys(UNSERVED, _never),
}
#: The same for the fields of a message, some of which answers have, and for its parts.
_OF_A_MESSAGE: dict[str, Callable[[Any], bool]] = {
    "name": _is(str),
    "tool_calls": lambda value: value == [],
    "annotations": lambda value: value == [],
    **dict.fromkeys(("refusal", "audio", "function_call"), _never),
}
_OF_A_PART: dict[str, Callable[[Any], bool]] = {"prompt_cache_breakpoint": _is(dict)}
_OF_STREAM_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "include_usage": _is(bool),
    "include_obfuscation": lambda value: value is False,
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
        data = json.loads(body, object_pairs_hook=_once)
    except APIError:
        raise
    except (ValueError, RecursionError) as error:
        why = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise APIError(
            400, f'body: got no JSON{why}, expected a JSON object such as {{"text": "The text of a document."}}.'
        ) from error
    if not isinstance(data, dict):
        raise APIError(400, f"body: got {type(data).__name__}, expected a JSON object.")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose fields is given once. Which of two is meant would be a guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise APIError(400, f"body: got the field {twice[:80]!a} twice, expected each once.")
    return found


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """
    Check a chat completion's body.

    Raises
    ------
    APIError
        For the first field that is wrong or unknown. Nothing is guessed or left out.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _check("", body, _ACCEPTED, FIELDS - _ACCEPTED.keys())
    if not isinstance(given.get("model"), str):
        raise wrong("model", given.get("model", "nothing"), "the name of a model", "GET /v1/models lists it.")
    fields = {name: read(given[name]) for name, read in _READERS.items() if name in given}
    if "max_completion_tokens" in given:
        fields["max_tokens"] = _whole("max_completion_tokens", 1)(given["max_completion_tokens"])
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", options, "an object with include_usage, true or false")
    _check("stream_options.", options, _OF_STREAM_OPTIONS)
    return ChatRequest(
        given["model"],
        _messages(given.get("messages")),
        include_usage=bool(options.get("include_usage", False)),
        **fields,
    )


def _check(
    place: str, given: Mapping[str, Any], accepted: Mapping[str, Callable[[Any], bool]], used: Collection[str] = ()
) -> None:
    """Raise APIError for a field of an object that is not known, or that is accepted with other values only."""
    for name, value in given.items():
        if name not in accepted and name not in used:
            known = sorted({*used, *(name for name, is_served in accepted.items() if is_served != _never)})
            shown = place + ascii(name)[1:-1][:80]
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"Did you mean {near[0]}?" if near else f"It knows {', '.join(known)}."
            raise wrong(shown, value, "a field that this server knows", remedy)
        if name in accepted and value is not None and not accepted[name](value):
            raise wrong(place + name, value, "a value that this server can serve", "Leave it out.")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong("messages", value, f"a list of 1 to {MOST_MESSAGES} messages")
    return tuple(_message(message, number) for number, message in enumerate(value))


def _message(message: Any, number: int) -> dict[str, str]:
    field = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise wrong(f"{field}.role", message, f"an object with role, one of {', '.join(ROLES)}, and content")
    _check(f"{field}.", message, _OF_A_MESSAGE, ("role", "content"))
    content = message.get("content")
    if isinstance(content, list):  # parts, as some clients send them
        content = "".join(_part(f"{field}.content", part) for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": text_of(f"{field}.content", content)}


def _part(field: str, part: Any) -> str:
    """The text of a part of a message."""
    if not isinstance(part, dict) or part.get("type") != "text":
        raise wrong(field, part, "a text, or parts of type text", "Pictures cannot be read.")
    _check(f"{field}.", part, _OF_A_PART, ("type", "text"))
    return text_of(field, part.get("text"))


def text_of(field: str, value: Any) -> str:
    """A text in Unicode. Raises APIError for anything else."""
    if not isinstance(value, str):
        raise wrong(field, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # one half of a surrogate pair
        raise wrong(field, "text", "a text in Unicode", "It has half of a surrogate pair.") from error
    return value


def _whole(field: str, low: int, high: int = HIGHEST_WHOLE) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON knows one kind of number: 8.0 is 8
            value = int(value)
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
    return tuple(text_of("stop", stop) for stop in stops)


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
    "seed": _whole("seed", LOWEST_SEED),
}

#: All fields that a chat completion may have.
FIELDS = frozenset({*_READERS, *_ACCEPTED, "model", "messages", "max_completion_tokens", "stream_options"})
