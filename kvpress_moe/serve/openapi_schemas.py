"""The JSON schemas of what clients send and get: the components of the OpenAPI document."""

from __future__ import annotations

from typing import Any

from kvpress_moe.serve.chat_request import (
    HIGHEST_WHOLE,
    LONGEST_STOP,
    LOWEST_SEED,
    MOST_MESSAGES,
    MOST_STOPS,
    ROLES,
    UNSERVED,
)

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def ref(name: str) -> Schema:
    """A reference to one of the schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas_of(model_name: str) -> dict[str, Schema]:
    """
    All schemas by name.

    Parameters
    ----------
    model_name : str
        The only model that requests may name.
    """
    return {
        "ChatRequest": _chat_request(model_name),
        "Message": _MESSAGE,
        "ChatCompletion": _answer("chat.completion", _CHOICE, ["usage"]),
        "ChatCompletionChunk": _answer("chat.completion.chunk", _PIECE),
        "Usage": _USAGE,
        "NewDocument": _NEW_DOCUMENT,
        "Document": _DOCUMENT,
        "DocumentProgress": _given(object=_only("document.progress"), done=COUNT, total=COUNT),
        "DocumentList": _list_of("Document"),
        "DeletedDocument": _given(id=TEXT, object=_only("document"), deleted=_only(True)),
        "Model": _given(id=TEXT, object=_only("model"), created=COUNT, owned_by=TEXT),
        "ModelList": _list_of("Model"),
        "Health": _given(status=_only("ok"), active=COUNT, waiting=COUNT),
        "Error": _ERROR,
    }


# ── what clients send ────────────────────────────────────────────────────────────────────────────────────────────────


def _taken(required: list[str], properties: dict[str, Schema], description: str) -> Schema:
    """An object that clients send. Other fields are refused."""
    return {
        "type": "object",
        "description": description,
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


def _optional(description: str, kind: str, **rules: Any) -> Schema:
    """A field that may be left out; null means the same."""
    return {"type": [kind, "null"], **rules, "description": description}


def _unused(kind: str) -> Schema:
    return _optional("Changes nothing here.", kind)


def _only_null_or(value: Any) -> Schema:
    return {"enum": [value, None], "description": "Other values cannot be served."}


_NEVER: Schema = {"type": "null", "description": "Cannot be served."}
_ONE_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_PART = _taken(
    ["type", "text"],
    {"type": {"const": "text"}, "text": TEXT, "prompt_cache_breakpoint": _unused("object")},
    "A part of a message. Only texts can be read.",
)
_MESSAGE = _taken(
    ["role", "content"],
    {
        "role": {"enum": list(ROLES), "description": "`developer` means `system`."},
        "content": {"anyOf": [TEXT, {"type": "array", "items": _PART}], "description": "A text, or parts of it."},
        "name": _optional("The model does not see it.", "string"),
        "refusal": _NEVER,
        "audio": _NEVER,
        "function_call": _NEVER,
        "tool_calls": _only_null_or([]),
        "annotations": _only_null_or([]),
    },
    "A message of the chat. Fields that an answer of this server has may be sent back.",
)
_TOKENS = {"minimum": 1, "maximum": HIGHEST_WHOLE}


def _chat_request(model_name: str) -> Schema:
    return _taken(
        ["model", "messages"],
        {
            "model": {"type": "string", "enum": [model_name]},
            "messages": {"type": "array", "minItems": 1, "maxItems": MOST_MESSAGES, "items": ref("Message")},
            "documents": _optional("The id of one document that the chat is about.", "array", items=TEXT, maxItems=1),
            "stream": _optional("Send the answer piece by piece.", "boolean"),
            "stream_options": {
                **_taken(
                    [],
                    {
                        "include_usage": _optional("End a stream with the count of tokens.", "boolean"),
                        "include_obfuscation": _only_null_or(False),
                    },
                    "Used with `stream`.",
                ),
                "type": ["object", "null"],
            },
            "max_tokens": _optional("Most tokens of the answer. 256 by default.", "integer", **_TOKENS),
            "max_completion_tokens": _optional("The same. It wins over `max_tokens`.", "integer", **_TOKENS),
            "temperature": _optional("0: always the likeliest token.", "number", minimum=0, maximum=2, default=1),
            "top_p": _optional("Share of the likeliest tokens.", "number", minimum=0, maximum=1, default=1),
            "stop": {
                "anyOf": [
                    _ONE_STOP,
                    {"type": "array", "maxItems": MOST_STOPS, "items": _ONE_STOP},
                    {"type": "null"},
                ],
                "description": "Texts at which the answer ends. They are not part of it.",
            },
            "seed": _optional("Makes chance repeatable.", "integer", minimum=LOWEST_SEED, maximum=HIGHEST_WHOLE),
            "n": _only_null_or(1),
            "logprobs": _only_null_or(False),
            "logit_bias": _only_null_or({}),
            "frequency_penalty": _only_null_or(0),
            "presence_penalty": _only_null_or(0),
            "response_format": _only_null_or({"type": "text"}),
            "modalities": _only_null_or(["text"]),
            "reasoning_effort": _only_null_or("none"),
            "verbosity": _only_null_or("medium"),
            "parallel_tool_calls": _unused("boolean"),
            "store": _unused("boolean"),
            "metadata": _unused("object"),
            "user": _unused("string"),
            "service_tier": _unused("string"),
            "safety_identifier": _unused("string"),
            "prompt_cache_key": _unused("string"),
            "prompt_cache_retention": _unused("string"),
            "prompt_cache_options": _unused("object"),
            **dict.fromkeys(UNSERVED, _NEVER),
        },
        "A chat to answer. Fields that cannot be served are refused by name.",
    )


_NEW_DOCUMENT = _taken(
    ["text"],
    {
        "text": {"type": "string", "pattern": "\\S", "description": "It must fit into the model's context."},
        "title": _optional("Its first 200 characters are kept.", "string"),
        "stream": _optional("Tell the progress layer by layer.", "boolean"),
    },
    "A text to read and compress.",
)

# ── what clients get ─────────────────────────────────────────────────────────────────────────────────────────────────


def _given(**properties: Schema) -> Schema:
    """An object that clients get, with all these fields. Later versions may add more."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _only(value: Any) -> Schema:
    return {"const": value}


def _list_of(name: str) -> Schema:
    return _given(object=_only("list"), data={"type": "array", "items": ref(name)})


def _finish(*also: None) -> Schema:
    return {
        "enum": ["stop", "length", *also],
        "description": "`length`: `max_tokens`, or the model's context, is full.",
    }


_CHOICE = _given(
    index=_only(0),
    message=_given(role=_only("assistant"), content=TEXT),
    logprobs={"type": "null"},
    finish_reason=_finish(),
)
_PIECE = _given(
    index=_only(0),
    delta={"type": "object", "properties": {"role": _only("assistant"), "content": TEXT}},
    logprobs={"type": "null"},
    finish_reason=_finish(None),
)
_USAGE = _given(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=_given(
        cached_tokens={**COUNT, "description": "Tokens of the prompt that a compressed cache held."}
    ),
)


def _answer(kind: str, choice: Schema, also_required: list[str] | None = None) -> Schema:
    answer = _given(
        id=TEXT,
        object=_only(kind),
        created=COUNT,
        model=TEXT,
        choices={"type": "array", "maxItems": 1, "items": choice},
    )
    answer["properties"]["usage"] = ref("Usage")
    answer["required"] += also_required or []
    return answer


_NATS: Schema = {"type": ["number", "null"], "minimum": 0}
_DOCUMENT = _given(
    id={"type": "string", "pattern": "^doc-[0-9a-f]{24}$"},
    object=_only("document"),
    title=TEXT,
    tokens={**COUNT, "description": "Tokens that its cache stands for."},
    bytes={**COUNT, "description": "Bytes of its compressed cache."},
    created={**COUNT, "description": "Seconds since 1970."},
)
_DOCUMENT["properties"] |= {
    "full_bytes": {**COUNT, "description": "Bytes of its cache in 16 bits, uncompressed."},
    "read_seconds": {"type": ["number", "null"], "minimum": 0, "description": "Time to read and compress it."},
    "kept": {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
        "description": "Share of the pairs that each strategy got. `evict`: pairs that are gone.",
    },
    "expected_kl": {**_NATS, "description": "Estimated KL divergence of answers, in nats."},
    "max_kl": {**_NATS, "description": "The bound on it that was asked for."},
    "is_promised": {
        "type": ["boolean", "null"],
        "description": "Whether the bound is promised. It is not if the text is unlike those of the calibration.",
    },
}
_ERROR = _given(
    error=_given(
        message=TEXT,
        type={
            "enum": [
                "invalid_request_error",
                "authentication_error",
                "not_found_error",
                "rate_limit_error",
                "server_error",
            ]
        },
        param={"type": ["string", "null"], "description": "The field that is wrong."},
        code={"type": ["string", "null"], "description": "A word that programs can compare."},
    )
)
