"""The OpenAPI document: it is valid, has every route and no other, and allows just the bodies that the server takes."""

import json
import re
from functools import cache

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.app import make_app
from kvpress_moe.serve.chat_request import FIELDS, parse_chat
from kvpress_moe.serve.document_request import parse_document
from kvpress_moe.serve.openapi import openapi_document
from kvpress_moe.serve.scheduler import Scheduler
from tests.serve.made import NAME, TEXT, make_engine

ADDRESS = "http://127.0.0.1:8000"
DOCUMENT = openapi_document(NAME)
SCHEMAS = DOCUMENT["components"]["schemas"]


@cache
def validator(name):
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def agree(name, body, parse):
    """Whether the schema allows a body that the server takes, or forbids one that it refuses."""
    try:
        parse(body)
    except APIError:
        return not validator(name).is_valid(body)
    return validator(name).is_valid(body)


@pytest.fixture(params=[None, "secret"], ids=["no key", "key"])
def key(request):
    return request.param


@pytest.fixture
def client(llama, chat_tokenizer, tmp_path, key):
    engine = make_engine(llama, chat_tokenizer, tmp_path)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with TestClient(make_app(engine, Scheduler(engine), key), base_url=ADDRESS, headers=headers) as client:
        yield client


def operations(document):
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield path, method, item[method]


def test_it_is_valid_and_needs_no_key(client, key):
    client.headers.pop("authorization", None)
    document = client.get("/openapi.json").json()
    validate(document)
    assert document == openapi_document(NAME, needs_key=key is not None)


def test_it_has_every_route_of_the_app_and_no_other(client):
    routes = {(route.path, method.lower()) for route in client.app.routes for method in route.methods - {"HEAD"}}
    assert routes == {(path, method) for path, method, _ in operations(DOCUMENT)}


def test_it_says_which_routes_need_the_key(client, key):
    client.headers.pop("authorization", None)
    for path, method, operation in operations(openapi_document(NAME, needs_key=key is not None)):
        refused = client.request(method, re.sub("{.*?}", "x", path), content=b"{}").status_code == 401
        assert refused == ("security" in operation) == ("401" in operation["responses"]), path
        assert key is not None or not refused


def test_it_describes_all_fields_of_a_chat_and_no_other():
    assert SCHEMAS["ChatRequest"]["properties"].keys() == FIELDS
    assert all(
        schema["additionalProperties"] is False
        for name, schema in SCHEMAS.items()
        if name in ("ChatRequest", "Message", "NewDocument")
    )


#: Values that are right for some field, and their neighbours that are not.
VALUES = (
    *(None, False, True, 0, 1, 2, 3, -1, 0.0, 1.0, 1.5, 2.0, 2.1, 1e300, float("inf"), 2**63 - 1, 2**63),
    *(-(2**63), -(2**63) - 1, "", " ", "a", "x" * 200, "x" * 201, "text", "none", "medium", "user", "tool", NAME),
    *([], ["a"], [""], ["x" * 201], ["a"] * 4, ["a"] * 5, ["text"], ["text", "audio"], [1], [None], [[]]),
    *({}, {"type": "text"}, {"type": "text", "a": 1}, {"type": "json_object"}, {"a": 1}),
    *({"include_usage": value} for value in (True, False, None, 1)),
    *({"include_obfuscation": value} for value in (True, False, None)),
    [{"type": "text", "text": "a"}],
    *([{"type": "text", "text": "a", name: value}] for name in ("text", "image_url") for value in (None, 1, "b", {})),
    [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
    [{"type": "image_url", "image_url": {"url": "a"}}],
    [{"role": "user", "content": "a"}],
)


@pytest.mark.parametrize("name", sorted(FIELDS | {"more"}))
def test_it_allows_just_the_chats_that_the_server_takes(name):
    for value in VALUES:
        if name == "documents" and isinstance(value, list) and len(value) > 1:
            continue  # the engine refuses them, in words of its own
        body = {"model": NAME, "messages": [{"role": "user", "content": "Who?"}]} | {name: value}
        if name == "model" and isinstance(value, str) and value != NAME:
            continue  # the app refuses them
        assert agree("ChatRequest", body, parse_chat), body


@pytest.mark.parametrize("name", sorted(SCHEMAS["Message"]["properties"].keys() | {"tool_call_id", "id"}))
def test_it_allows_just_the_messages_that_the_server_takes(name):
    for value in VALUES:
        message = {"role": "user", "content": "Who?"} | {name: value}
        assert agree("ChatRequest", {"model": NAME, "messages": [message]}, parse_chat), message


@pytest.mark.parametrize("name", ["text", "title", "stream", "more"])
def test_it_allows_just_the_documents_that_the_server_takes(name):
    for value in VALUES:
        assert agree("NewDocument", {"text": "a"} | {name: value}, parse_document), value


@pytest.mark.parametrize("name", ["ChatRequest", "NewDocument"])
def test_what_it_demands_is_demanded(name):
    parse = {"ChatRequest": parse_chat, "NewDocument": parse_document}[name]
    right = {
        "ChatRequest": {"model": NAME, "messages": [{"role": "user", "content": "a"}]},
        "NewDocument": {"text": "a"},
    }
    assert agree(name, right[name], parse)
    for field in right[name]:
        assert agree(name, {key: value for key, value in right[name].items() if key != field}, parse)


@pytest.mark.parametrize("n", [0, 1, 1000, 1001])
def test_the_number_of_messages_has_one_limit(n):
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}] * n}
    assert agree("ChatRequest", body, parse_chat)


def test_answers_are_as_described(client):
    """Every reply of the JSON routes, and every event, is of the schema that stands for it."""

    def check(name, value):
        validator(name).validate(value)

    def events(response):
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]

    made = client.post("/v1/documents", json={"text": TEXT}).json()
    check("Document", made)
    assert made.keys() <= SCHEMAS["Document"]["properties"].keys()
    *progress, last = events(client.post("/v1/documents", json={"text": TEXT + "more", "stream": True}))
    for event in progress:
        check("DocumentProgress", event)
    check("Document", last)
    check("DocumentList", client.get("/v1/documents").json())
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 3,
        "documents": [made["id"]],
    }
    check("ChatCompletion", client.post("/v1/chat/completions", json=body).json())
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    for event in events(client.post("/v1/chat/completions", json=body | stream)):
        check("ChatCompletionChunk", event)
    check("Document", client.get(f"/v1/documents/{made['id']}").json())
    check("DeletedDocument", client.delete(f"/v1/documents/{made['id']}").json())
    check("ModelList", client.get("/v1/models").json())
    check("Health", client.get("/health").json())
    for path in ("/v1/documents/x", "/assets/x", "/nothing"):
        check("Error", client.get(path).json())
