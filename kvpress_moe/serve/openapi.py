"""The server's OpenAPI document: all routes, what they take, and what they answer."""

from __future__ import annotations

from typing import Any

from kvpress_moe import __version__
from kvpress_moe.serve.openapi_schemas import ref, schemas_of

#: What each status of a refusal means.
REFUSALS = {
    400: "The request, or its Host header, is wrong.",
    401: "The key is missing or wrong.",
    403: "A web page of another site asks, and the server has no key.",
    404: "There is no such document, model or file.",
    413: "The body is too long.",
    429: "Too many requests wait. `Retry-After` says for how many seconds.",
    499: "The client has gone before the answer began. Nobody gets this; it is counted.",
    500: "The server failed. Its log says more.",
    503: "The server is shutting down.",
    507: "The document cannot be written: no space or permission.",
}
_WORK = (413, 429, 499, 503)  # what can happen to requests that wait for the model
_EVENTS = "server-sent events. The last one is `data: [DONE]`; if something fails, an `Error` comes before it."


def openapi_document(model_name: str, needs_key: bool = False) -> dict[str, Any]:
    """
    The document, in OpenAPI 3.1.

    Parameters
    ----------
    model_name : str
        The only model that requests may name.
    needs_key : bool
        Whether the server has a key, so that requests must send it.
    """

    def route(
        name: str, summary: str, answers: dict[str, Any], *refusals: int, is_open: bool = False, **more: Any
    ) -> dict[str, Any]:
        """An operation. ``is_open``: it never needs a key. ``more``: its other fields."""
        if needs_key and not is_open:
            refusals = (401, *refusals)
        elif not needs_key:
            refusals = (403, *refusals)
        described = {str(status): _refusal(status) for status in sorted((400, 500, *refusals))}
        operation = {"operationId": name, "summary": summary, **more, "responses": {**answers, **described}}
        if needs_key and not is_open:
            operation["security"] = [{"key": []}]
        return operation

    by_name = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
    components: dict[str, Any] = {"schemas": schemas_of(model_name)}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvpress-moe",
            "version": __version__,
            "summary": "OpenAI's chat completions over compressed documents.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/v1/chat/completions": {
                "post": route(
                    "createChatCompletion",
                    "Answer a chat.",
                    {"200": _answer("ChatCompletion", "ChatCompletionChunk")},
                    404,
                    *_WORK,
                    requestBody=_body("ChatRequest"),
                )
            },
            "/v1/documents": {
                "post": route(
                    "createDocument",
                    "Read and compress a document. A text that is known is not read again.",
                    {
                        "200": {
                            "description": f"With `stream`: {_EVENTS}",
                            "content": _events("DocumentProgress", "Document"),
                        },
                        "201": {**_json("The document.", "Document"), "links": _LINKS},
                    },
                    *_WORK,
                    507,
                    requestBody=_body("NewDocument"),
                ),
                "get": route(
                    "listDocuments", "All documents, the oldest first.", {"200": _json("The list.", "DocumentList")}
                ),
            },
            "/v1/documents/{name}": {
                **by_name,
                "get": route("getDocument", "A document.", {"200": _json("It.", "Document")}, 404),
                "delete": route(
                    "deleteDocument", "Delete a document.", {"200": _json("It is gone.", "DeletedDocument")}, 404
                ),
            },
            "/v1/models": {"get": route("listModels", "The model.", {"200": _json("A list of one.", "ModelList")})},
            "/health": {
                "get": route(
                    "getHealth", "How many requests there are.", {"200": _json("It runs.", "Health")}, is_open=True
                )
            },
            "/metrics": {
                "get": route("getMetrics", "Figures for Prometheus.", {"200": _plain("Its text format.", "text/plain")})
            },
            "/openapi.json": {
                "get": route(
                    "getOpenAPI",
                    "This document.",
                    {"200": {"description": "It.", "content": {"application/json": {"schema": {"type": "object"}}}}},
                    is_open=True,
                )
            },
            "/": {"get": _page("getPage", "A page to add documents and to chat.", "text/html")},
            "/assets/{name}": {
                **by_name,
                "get": _page("getAsset", "A file of the page.", "text/css", "text/javascript"),
            },
        },
        "components": components,
    }


_LINKS = {
    name: {"operationId": name, "parameters": {"name": "$response.body#/id"}}
    for name in ("getDocument", "deleteDocument")
}


def _page(name: str, summary: str, *kinds: str) -> dict[str, Any]:
    """A part of the web page. It needs no key, and other sites may ask for it."""
    refusals = {str(status): _refusal(status) for status in (400, 404, 500)}
    return {"operationId": name, "summary": summary, "responses": {"200": _plain("It.", *kinds), **refusals}}


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": ref(schema)}}}


def _json(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": ref(schema)}}}


def _plain(description: str, *kinds: str) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": {"type": "string"}} for kind in kinds}}


def _answer(whole: str, piece: str) -> dict[str, Any]:
    """An answer in one piece, or by events."""
    content = {**_json("", whole)["content"], **_events(piece)}
    return {"description": f"The answer. With `stream`: {_EVENTS}", "content": content}


def _events(*schemas: str) -> dict[str, Any]:
    """Server-sent events. The schema is that of one event."""
    some = {"anyOf": [ref(name) for name in (*schemas, "Error")]}
    data = [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": some}]
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "anyOf": data}}}
    return {"text/event-stream": {"schema": event}}


def _refusal(status: int) -> dict[str, Any]:
    refusal = _json(REFUSALS[status], "Error")
    if status == 429:
        refusal["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 0}}}
    return refusal
