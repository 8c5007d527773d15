"""The API: OpenAI's shapes, streaming and not; documents; refusals; turns; nothing left behind by clients that go."""

import asyncio
import json
import threading
from unittest.mock import ANY

import pytest
from jinja2 import TemplateError
from starlette.testclient import TestClient

from kvpress_moe.cli.serve import checked_origin
from kvpress_moe.errors import SettingError
from kvpress_moe.serve.app import make_app, streamed_by
from kvpress_moe.serve.engine import LONG_PREFIX
from kvpress_moe.serve.scheduler import Job, Scheduler
from tests.serve.made import NAME, TEXT, make_engine

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def engine(llama, chat_tokenizer, tmp_path):
    return make_engine(llama, chat_tokenizer, tmp_path)


@pytest.fixture
def client(engine):
    with TestClient(make_app(engine, Scheduler(engine)), base_url=ADDRESS) as client:
        yield client


def ask(client, content="Who signed?", **fields):
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    return client.post("/v1/chat/completions", json=body | fields)


def events(response):
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_is_answered_in_openais_shape(client):
    answer = ask(client).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == NAME
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_gives_the_same_text_in_pieces(client):
    whole = ask(client).json()["choices"][0]["message"]["content"]
    chunks = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == whole
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_document_is_read_once_and_asked_often(client, engine):
    made = client.post("/v1/documents", json={"text": TEXT, "title": "mill"})
    assert made.status_code == 201
    document = made.json()
    assert document["object"] == "document"
    assert document["tokens"] > len(TEXT)
    answers = [ask(client, documents=[document["id"]]).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == document["tokens"]
    again = client.post("/v1/documents", json={"text": TEXT, "title": "another"}).json()
    assert again == document  # not read again
    assert client.get("/v1/documents").json()["data"] == [document]
    assert client.get(f"/v1/documents/{document['id']}").json() == document
    assert client.delete(f"/v1/documents/{document['id']}").json()["deleted"]
    assert ask(client, documents=[document["id"]]).status_code == 404


def test_a_document_tells_its_progress_layer_by_layer(client):
    *progress, document = events(client.post("/v1/documents", json={"text": TEXT, "stream": True}))
    assert [event["done"] for event in progress] == [1, 2]
    assert document["object"] == "document"


def test_a_document_answers_as_a_chat_that_begins_with_it(client):
    document = client.post("/v1/documents", json={"text": TEXT}).json()
    by_id = ask(client, "Who signed?", documents=[document["id"]]).json()
    by_prefix = ask(client, TEXT + "\n\nWho signed?").json()
    assert by_prefix["usage"] == by_id["usage"]
    assert by_prefix["choices"] == by_id["choices"]
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Who signed?"}
    with_system = ask(client, documents=[document["id"]], messages=[system, user])
    assert with_system.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == document["tokens"]


def test_a_long_prefix_is_compressed_by_itself_and_recognised(client, engine):
    assert len(TEXT) > LONG_PREFIX
    first, second = (ask(client, f"{TEXT}\n\n{question}").json() for question in ("Who signed?", "When?"))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached[0] == 0  # it was read for this question
    assert cached[1] > LONG_PREFIX
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"] + len("Who signed?") - len("When?")
    assert len(engine.store._all()) == 1
    ask(client, "A short question")
    assert len(engine.store._all()) == 1
    (kept,) = engine.store._all()
    assert client.get("/v1/documents").json()["data"] == []  # it has no name for clients
    assert client.get(f"/v1/documents/{kept.id}").status_code == 404
    assert client.delete(f"/v1/documents/{kept.id}").status_code == 404


def test_documents_are_found_by_another_server(client, engine, llama, chat_tokenizer, tmp_path):
    document = client.post("/v1/documents", json={"text": TEXT}).json()
    second = make_engine(llama, chat_tokenizer, tmp_path)
    with TestClient(make_app(second, Scheduler(second)), base_url=ADDRESS) as other:
        assert other.get("/v1/documents").json()["data"] == [document]
        answers = [ask(one, documents=[document["id"]]).json()["choices"] for one in (client, other)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": -1}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": "a" * 201}, 400, "stop"),
        ({"temperature": 10**400}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"max_tokens": 10**4000}, 400, "max_tokens"),
        ({"\ud800": 1}, 400, "\\ud800"),
        ({"seed": 1.5}, 400, "seed"),
        ({"stream": 1}, 400, "stream"),
        ({"n": 2}, 400, "n"),
        ({"tools": []}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"documents": ["doc-0"]}, 404, "documents"),
        ({"documents": ["a", "b"]}, 400, "documents"),
        ({"documents": "a"}, 400, "documents"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, 400, "messages"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_by_field_in_openais_shape(client, fields, status, param):
    body = {"model": NAME, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2} | fields
    response = client.post("/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert ask(client, max_tokens=1).status_code == 200


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"3", b"[" * 100_000, b"\xff"])
def test_bodies_that_are_no_objects_are_refused(client, body):
    for path in ("/v1/chat/completions", "/v1/documents"):
        assert client.post(path, content=body).status_code == 400


@pytest.mark.parametrize("body", [{}, {"text": " "}, {"text": 3}, {"text": "a", "title": 3}, {"text": "a", "ttl": 3}])
def test_documents_without_a_text_are_refused(client, body):
    assert client.post("/v1/documents", json=body).status_code == 400


def test_a_text_that_is_too_long_is_refused_with_its_length(client):
    answer = client.post("/v1/documents", json={"text": "word " * 1000})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_paths_methods_and_hosts_are_refused(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/v1/documents/doc-0").status_code == 404
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_the_coldest_temperature_is_the_likeliest_token(client):
    answers = [ask(client, temperature=temperature).json()["choices"] for temperature in (0, 1e-38)]
    assert answers[0] == answers[1]


def test_a_text_with_any_mark_in_it_is_kept_whole(client, engine):
    """Forty hashes, as separators in logs have them, cut nothing off."""
    text = "part one\n" + "#" * 40 + "\npart two"
    document = client.post("/v1/documents", json={"text": text}).json()
    assert document["tokens"] == len(engine.tokens(engine.prefix_of(text)))
    assert "part two" in engine.prefix_of(text)


def test_pages_of_other_sites_are_refused_where_no_key_is_set(client):
    foreign = {"origin": "https://evil.example", "content-type": "text/plain"}
    for path in ("/v1/documents", "/v1/chat/completions"):
        assert client.post(path, content=b"{}", headers=foreign).status_code == 403
    assert client.get("/v1/models", headers={"origin": ADDRESS}).status_code == 200


SITE = "https://chat.example"


@pytest.mark.parametrize(
    ("key", "origins"), [(None, (SITE, "http://localhost:3000")), ("secret", (SITE,)), ("secret", ("*",))]
)
def test_pages_of_sites_that_are_allowed_may_ask_and_read_the_answers(engine, key, origins):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    app = make_app(engine, Scheduler(engine), key, origins=origins)
    with TestClient(app, base_url=ADDRESS, headers=headers) as client:
        asked = {
            "access-control-request-method": "DELETE",
            "access-control-request-headers": "authorization,x-stainless-os",
            "access-control-request-private-network": "true",
        }
        before = client.options("/v1/documents/doc-1", headers={"origin": SITE, **asked})
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] in (SITE, "*")
        assert before.headers["access-control-allow-private-network"] == "true"
        assert "x-stainless-os" in before.headers["access-control-allow-headers"]
        foreign = client.options("/v1/documents", headers={"origin": SITE, "host": "evil.example", **asked})
        assert foreign.status_code == 400
        for stream in (False, True):
            body = {"model": NAME, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2, "stream": stream}
            answer = client.post("/v1/chat/completions", json=body, headers={"origin": SITE})
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] in (SITE, "*")
            assert answer.headers["access-control-expose-headers"] == "Retry-After"
        missing = client.get("/v1/documents/doc-1", headers={"origin": SITE})
        assert missing.status_code == 404
        assert missing.headers["access-control-allow-origin"] in (SITE, "*")
        if key is not None:
            unknown = client.get("/v1/documents", headers={"origin": SITE, "authorization": "Bearer wrong"})
            assert unknown.status_code == 401
            assert unknown.headers["access-control-allow-origin"] in (SITE, "*")
        if "*" in origins:
            return
        for other in (f"{SITE}.evil.example", "null", SITE.upper(), f"{SITE}:8443"):
            assert client.options("/v1/documents", headers={"origin": other, **asked}).status_code == 400
            refused = client.get("/v1/documents", headers={"origin": other})
            assert "access-control-allow-origin" not in refused.headers
            assert refused.status_code == (403 if key is None else 200)  # a browser keeps the answer from the page


def test_all_sites_are_not_allowed_without_a_key(engine):
    with pytest.raises(SettingError, match="origins: got"):
        make_app(engine, Scheduler(engine), None, origins=("*",))


@pytest.mark.parametrize(
    "wrong",
    [
        "*",
        "chat.example",
        "https://chat.example/",
        "https://chat.example/page",
        "https://a.example, https://b.example",
        "https://b\u00fccher.example",
        "http://a.example:70000",
        "http://a.\u212a",
        "null",
        "",
    ],
)
def test_what_is_no_origin_is_refused(wrong):
    with pytest.raises(SettingError, match="allow_origin: got"):
        checked_origin(wrong, None)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("HTTPS://Chat.Example:8443", "https://chat.example:8443"),
        ("https://chat.example:443", "https://chat.example"),
        ("http://localhost:80", "http://localhost"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_origins_are_taken_as_browsers_send_them(given, sent):
    assert checked_origin(given, None) == sent


def test_a_document_whose_file_is_broken_is_read_again(client, engine, tmp_path):
    document = client.post("/v1/documents", json={"text": TEXT}).json()
    engine.store._caches.clear()
    (tmp_path / f"{document['id']}.kv").write_bytes(b"broken")
    assert ask(client, TEXT + "\n\nWho signed?").status_code == 200
    assert client.get("/v1/documents").json()["data"] == []
    again = client.post("/v1/documents", json={"text": TEXT})
    assert again.status_code == 201
    engine.store._caches.clear()
    (tmp_path / f"{document['id']}.kv").write_bytes(b"broken")
    assert ask(client, documents=[document["id"]]).status_code == 404


def test_a_template_that_refuses_the_messages_is_a_wrong_request(client, engine, monkeypatch):
    def refuse(*_, **__):
        raise TemplateError("roles must alternate")

    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", refuse)
    answer = ask(client)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def test_models_health_and_metrics(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME]
    ask(client)
    assert client.get("/health").json() == {"status": "ok", "active": ANY, "waiting": 0}
    text = client.get("/metrics").text
    assert 'kvpress_moe_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert "kvpress_moe_completion_tokens_total 6.0" in text


def test_a_key_is_demanded_where_one_is_set(engine):
    with TestClient(make_app(engine, Scheduler(engine), "secret"), base_url=ADDRESS) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_full_queue_answers_429_with_a_time_to_wait(engine):
    scheduler, begun, going = Scheduler(engine, max_active=1, max_waiting=1), threading.Event(), threading.Event()

    def steps(emit):
        begun.set()
        yield going.wait(20)

    with TestClient(make_app(engine, scheduler), base_url=ADDRESS) as client:
        scheduler.submit(Job(steps, lambda *_: None))
        assert begun.wait(10)
        scheduler.submit(Job(steps, lambda *_: None))
        answer = ask(client)
        going.set()
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert any(ask(client).status_code == 200 for _ in range(10_000))  # as soon as both jobs have ended


def test_a_failure_is_told_and_the_next_request_is_served(client, engine, monkeypatch, caplog):
    monkeypatch.setattr(engine, "chat_text", lambda request: 1 / 0)
    answer = ask(client)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The server failed (ZeroDivisionError). Its log says more."
    assert "a request failed" in caplog.text
    monkeypatch.undo()
    assert ask(client).status_code == 200


def test_a_server_that_ends_finishes_what_it_began(engine):
    scheduler = Scheduler(engine)
    with TestClient(make_app(engine, scheduler), base_url=ADDRESS) as client:
        assert ask(client).status_code == 200
    assert not scheduler._thread.is_alive()


def test_a_stream_whose_client_goes_at_once_ends_its_job():
    """Its generator never begins, so nothing in it can cancel the job."""

    async def never():
        yield "data: 1\n\n"

    async def gone():
        job = Job(lambda emit: iter(()), lambda *_: None)

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.Event().wait()  # nobody reads

        await streamed_by(job, never())({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        return job.is_cancelled

    assert asyncio.run(gone())
