"""What no decent client sends: each request is answered or dropped, and the next one is served at once."""

import json
import socket
import time
from contextlib import suppress

import pytest

from kvpress_moe.serve.app import make_app
from kvpress_moe.serve.chat_request import parse_body
from kvpress_moe.serve.known_hosts import name_of
from kvpress_moe.serve.scheduler import Scheduler
from tests.serve.made import NAME, make_engine
from tests.serve.running import running

BODY = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}).encode()
UTF_16 = BODY.decode().encode("utf-16")
HOST = b"Host: 127.0.0.1:80\r\n"


@pytest.fixture(scope="module")
def address(llama, chat_tokenizer, tmp_path_factory):
    engine = make_engine(llama, chat_tokenizer, tmp_path_factory.mktemp("caches"))
    with running(make_app(engine, Scheduler(engine))) as address:
        yield "127.0.0.1", int(address.rpartition(":")[2])


def post(body, *headers, length=None, path=b"/v1/chat/completions"):
    """The bytes of a request. ``length``: what it says of its body."""
    lines = [b"POST " + path + b" HTTP/1.1", HOST.strip(), *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % (len(body) if length is None else length), b"", body])


def chunked(body):
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
    )


def answer_to(address, request, ends=False):
    """Status, headers and body of the answer to these bytes. 0: the server ended the connection without one."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(request)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        given = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                given += part
                head, found, body = given.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
                if found and (request.startswith(b"HEAD") or len(body) >= int(fields.get(b"content-length", 2**31))):
                    break
    if not given:
        return 0, {}, b""
    # a second answer may follow, to the rest of a body that is longer than it says
    return int(given.split()[1]), fields, body[: int(fields.get(b"content-length", 2**31))]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n", 200),
        (b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET http://elsewhere.example/health HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"get /health HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET /v1/documents/%00%ff%zz HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /assets/..%2fapp.py HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /health HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"Authorization: \xff\r\n\r\n", 200),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (post(BODY), 200),
        (chunked(BODY), 200),
        (post(UTF_16), 200),
        (post(BODY, length=9), 400),
        (post(BODY, b"Content-Length: 3"), 400),
        (post(b'{"a":' * 10**5), 400),
        (post(b'{"tools":' + b"[" * 900 + b"]" * 900 + b"}"), 400),
        (post(b'{"stop":' + b'{"a":' * 900 + b"1" + b"}" * 901), 400),
        (post(b'{"model":"\xed\xa0\x80","messages":[]}'), 400),
        (post(b'{"model":"' + b"\xff" + b'"}'), 400),
        (post(b'{"max_tokens":' + b"1" * 5000 + b"}"), 400),
        (post(b'{"text":"' + b"a" * 17 * 2**20 + b'"}', path=b"/v1/documents"), 413),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, bytes) else value,
)
def test_each_odd_request_has_its_status(address, request_bytes, status, caplog):
    given, headers, body = answer_to(address, request_bytes)
    assert given == status
    assert len(body) < 2000
    if b"json" in headers.get(b"content-type", b"") and given >= 400:
        assert json.loads(body)["error"]["message"]
    assert "a request failed" not in caplog.text
    assert answer_to(address, post(BODY))[0] == 200


@pytest.mark.parametrize("host", [b"", b"Host: evil.example\r\n", b"Host: [:80\r\n", b"Host: 127.0.0.1:x\r\n"])
def test_a_wrong_host_is_refused_in_openais_shape(address, host):
    """In HTTP 1.0 it may be missing."""
    for path in (b"/health", b"/", b"/nothing"):
        status, headers, body = answer_to(address, b"GET " + path + b" HTTP/1.0\r\n" + host + b"\r\n")
        assert (status, headers[b"content-type"]) == (400, b"application/json")
        assert json.loads(body)["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("host", "name"),
    [("localhost", "localhost"), ("LOCALHOST:80", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("", "")],
)
def test_the_name_of_a_host_has_no_port(host, name):
    assert name_of(host) == name


def test_endless_headers_are_refused(address):
    """The answer may be lost, because the server stops listening."""
    request = b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 200_000 + b"\r\n\r\n"
    assert answer_to(address, request)[0] in (400, 0)
    assert answer_to(address, post(BODY))[0] == 200


def test_a_wrong_method_is_told_the_right_ones(address):
    status, headers, _ = answer_to(address, b"PATCH /v1/documents HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (status, headers[b"allow"]) == (405, b"get, head, post")


def test_a_body_that_ends_too_early_is_no_failure_of_the_server(address, caplog):
    assert answer_to(address, post(BODY, length=5000), ends=True)[0] == 0
    time.sleep(0.1)
    assert "a request failed" not in caplog.text
    metrics = answer_to(address, b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n")[2].decode()
    assert 'path="/v1/chat/completions",status="499"' in metrics
    assert 'status="5' not in metrics


def test_slow_clients_hold_nobody_up(address):
    """Some never end their headers, some never end their bodies, one does not read its stream."""
    stream = post(BODY[:-1].replace(b'"max_tokens": 2', b'"max_tokens": 500') + b', "stream": true}')
    slow = [socket.create_connection(address) for _ in range(41)]
    try:
        for number, connection in enumerate(slow[1:]):
            connection.sendall(post(BODY, length=5000) if number % 2 else b"GET /hea")
        slow[0].sendall(stream)
        started = time.monotonic()
        assert answer_to(address, post(BODY))[0] == 200
        assert time.monotonic() - started < 5
    finally:
        for connection in slow:
            connection.close()


def test_a_field_that_is_given_twice_is_refused():
    """Which of the two is meant would be a guess."""
    for body in (b'{"model": "a", "model": "b"}', b'{"messages": [{"role": "user", "role": "system"}]}'):
        with pytest.raises(ValueError, match=r"got the field '(model|role)' twice"):
            parse_body(body)


def test_a_long_body_that_is_slow_to_parse_holds_nobody_up(address):
    """Two million objects take about a second."""
    with socket.create_connection(address, timeout=60) as slow:
        slow.sendall(post(b'{"a":[' + b"{}," * (2 * 10**6) + b"{}]}"))
        slow.setblocking(False)
        n_served = 0
        while True:
            assert answer_to(address, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200
            try:
                assert slow.recv(100).split()[1] == b"400"
                break
            except BlockingIOError:
                n_served += 1
    assert n_served > 3
