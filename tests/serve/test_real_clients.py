"""Real clients of OpenAI's API, and curl, with a real server over a tiny model: what they send by default is served."""

import asyncio
import json
import shutil
import subprocess
import threading
import time

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from kvpress_moe.serve.app import make_app
from kvpress_moe.serve.scheduler import Job, Scheduler
from tests.serve.made import NAME, TEXT, make_engine
from tests.serve.running import running

QUESTION = [{"role": "user", "content": "Who signed?"}]
KEY = "secret"


class Server:
    """What the tests need of a server: its address, the id of a document, and its scheduler."""

    def __init__(self, address, scheduler, document):
        self.address, self.scheduler, self.document = address, scheduler, document

    @property
    def base_url(self):
        return f"{self.address}/v1"

    def is_free(self, seconds=10.0):
        """Whether all jobs have ended, now or soon."""
        until = time.monotonic() + seconds
        while self.scheduler.n_active or self.scheduler.n_waiting:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture(scope="module")
def server(llama, chat_tokenizer, tmp_path_factory):
    """A server that demands a key. Nothing is asked through a proxy, or reported."""
    engine = make_engine(llama, chat_tokenizer, tmp_path_factory.mktemp("caches"))
    scheduler = Scheduler(engine, max_active=2, max_waiting=4)
    with pytest.MonkeyPatch.context() as patch, running(make_app(engine, scheduler, KEY)) as address:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("LANGSMITH_TRACING", "false")
        with OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            document = client.post("/documents", body={"text": TEXT, "title": "mill"}, cast_to=object)
        yield Server(address, scheduler, document["id"])


@pytest.fixture
def client(server):
    with OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client, **fields):
    return client.chat.completions.create(
        **{"model": NAME, "messages": QUESTION, "max_tokens": 6, "temperature": 0} | fields
    )


class Busy:
    """Holds a scheduler and fills its queue, until ``let_go`` is called."""

    def __init__(self, scheduler):
        self._begun, self._going = threading.Event(), threading.Event()
        scheduler.submit(Job(self._steps, lambda *_: None))
        assert self._begun.wait(10)
        for _ in range(scheduler.max_waiting):
            scheduler.submit(Job(self._steps, lambda *_: None))

    def _steps(self, emit):
        self._begun.set()
        yield self._going.wait(20)

    def let_go(self):
        self._going.set()


# ── the openai package ───────────────────────────────────────────────────────────────────────────────────────────────


def test_openai_reads_an_answer_and_its_usage(client, server):
    answer = ask(client, extra_body={"documents": [server.document]})
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details.cached_tokens > len(TEXT)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_openai_streams_the_same_text(client, server):
    about = {"extra_body": {"documents": [server.document]}}
    whole = ask(client, **about).choices[0].message.content
    chunks = list(ask(client, **about, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in list(ask(client, stream=True)))


def test_openais_helper_for_streams_gathers_the_answer(client):
    """It takes answers that end by themselves alone, so the text ends at a stop."""
    about = {"max_tokens": 6, "temperature": 0, "stop": ask(client).choices[0].message.content[-2:]}
    with client.chat.completions.stream(model=NAME, messages=QUESTION, **about) as stream:
        gathered = stream.get_final_completion()
    assert gathered.choices[0].finish_reason == "stop"
    assert gathered.choices[0].message.content == ask(client, **about).choices[0].message.content


def test_openai_goes_on_with_an_answer_in_any_of_its_shapes(client):
    """As an object, and as a dictionary with all the fields that are null."""
    message = ask(client).choices[0].message
    answers = [
        ask(client, messages=[*QUESTION, before, {"role": "user", "content": "When?"}]).choices[0].message.content
        for before in (message, message.model_dump(), message.to_dict())
    ]
    assert len(set(answers)) == 1


def test_openai_lists_the_model(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_openais_async_client_asks_several_things_at_once(server):
    async def ask_all():
        async with AsyncOpenAI(base_url=server.base_url, api_key=KEY) as client:
            whole = await asyncio.gather(*(ask(client) for _ in range(3)))
            stream = [chunk async for chunk in await ask(client, stream=True)]
        return [answer.choices[0].message.content for answer in whole], stream

    whole, stream = asyncio.run(ask_all())
    assert len(set(whole)) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[0]


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"extra_body": {"documents": ["doc-0"]}}, openai.NotFoundError, "documents", "not_found"),
        ({"n": 2}, openai.BadRequestError, "n", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", None),
        (
            {"messages": [{"role": "user", "content": "long " * 2000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
    ],
    ids=["model", "document", "n", "tools", "length"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_raises_the_error_that_its_users_expect(client, fields, error, param, code, stream):
    with pytest.raises(error) as raised:
        ask(client, **fields, stream=stream)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert param in str(raised.value)


def test_openai_raises_for_a_wrong_key(server):
    with (
        OpenAI(base_url=server.base_url, api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.models.list()
    assert raised.value.code == "invalid_api_key"


def test_openai_tries_again_when_the_queue_was_full(server, client):
    """It waits as long as Retry-After says."""
    assert server.is_free()
    busy = Busy(server.scheduler)
    try:
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        assert raised.value.code == "queue_full"
        threading.Timer(0.3, busy.let_go).start()
        started = time.monotonic()
        assert ask(client.with_options(max_retries=1)).usage.completion_tokens == 6
        assert time.monotonic() - started >= float(raised.value.response.headers["retry-after"])
    finally:
        busy.let_go()


def test_a_stream_that_is_closed_half_way_frees_the_server(client, server, monkeypatch):
    """Whole, the answers would take a minute."""
    read = server.scheduler.worker.read
    monkeypatch.setattr(server.scheduler.worker, "read", lambda reads: (time.sleep(0.03), read(reads))[1])
    for _ in range(3):
        stream = ask(client, stream=True, max_tokens=2000)
        assert [next(stream) for _ in range(3)]
        assert server.scheduler.n_active
        stream.close()
    assert server.is_free()
    assert ask(client).usage.completion_tokens == 6


def test_a_failure_half_way_is_raised(client, server, monkeypatch):
    def fail(reads):
        raise ZeroDivisionError

    stream = ask(client, stream=True, max_tokens=2000)
    next(stream)
    monkeypatch.setattr(server.scheduler.worker, "read", fail)
    with pytest.raises(openai.APIError, match=r"The server failed \(ZeroDivisionError\)"):
        list(stream)


def test_openais_hints_that_change_nothing_are_taken(client):
    hints = {
        "n": 1,
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "logit_bias": {},
        "logprobs": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "reasoning_effort": "none",
        "verbosity": "medium",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
    }
    assert ask(client, **hints).choices == ask(client).choices


# ── LangChain ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def chat(server):
    """LangChain's model, with a document."""
    return ChatOpenAI(
        model=NAME,
        base_url=server.base_url,
        api_key=KEY,
        max_tokens=6,
        temperature=0,
        extra_body={"documents": [server.document]},
    )


def test_langchain_asks_about_a_document(chat, client, server):
    answer = chat.invoke("Who signed?")
    assert answer.content == ask(client, extra_body={"documents": [server.document]}).choices[0].message.content
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.usage_metadata["input_token_details"]["cache_read"] > len(TEXT)
    assert answer.response_metadata["finish_reason"] == "length"


def test_langchain_streams_the_same_text(chat):
    pieces = list(chat.stream("Who signed?", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == chat.invoke("Who signed?").content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 6


def test_langchain_chains_a_prompt_with_the_model(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Answer in {language}."), ("human", "{question}")])
    answer = (prompt | chat).invoke({"language": "French", "question": "Who signed?"})
    assert answer.content == chat.invoke([SystemMessage("Answer in French."), HumanMessage("Who signed?")]).content
    assert answer.usage_metadata["input_tokens"] > chat.invoke("Who signed?").usage_metadata["input_tokens"]


def test_langchain_goes_on_with_a_chat_in_any_of_its_shapes(chat):
    """A name, parts instead of a text, and an answer that was streamed."""
    first, *rest = chat.stream("Who signed?")
    for piece in rest:
        first = first + piece
    parts = HumanMessage([{"type": "text", "text": "Who signed?"}], name="anna")
    answers = [
        chat.invoke([question, before, HumanMessage("When?")]).content
        for question, before in ((HumanMessage("Who signed?"), AIMessage(first.content)), (parts, first))
    ]
    assert answers[0] == answers[1]


def test_langchain_asks_several_things_at_once(chat):
    assert len({answer.content for answer in chat.batch(["Who signed?"] * 3)}) == 1
    assert asyncio.run(chat.ainvoke("Who signed?")).content == chat.invoke("Who signed?").content


def test_a_bare_langchain_model_is_served(server):
    """With nothing but what it sends by default, and a short answer."""
    bare = ChatOpenAI(model=NAME, base_url=server.base_url, api_key=KEY, max_tokens=3)
    assert bare.invoke("Who?").usage_metadata["output_tokens"] <= 3


# ── curl ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def curl(server, tmp_path):
    """``curl(path, *arguments)`` returns the status and what was printed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def run(path, *arguments, key=KEY):
        headers = [] if key is None else ["-H", f"Authorization: Bearer {key}"]
        command = ["curl", "-s", "-w", "\n%{http_code}", f"{server.address}{path}", *headers, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        printed, _, status = ended.stdout.rpartition("\n")
        return int(status), printed

    return run


def test_curl_posts_a_document_from_a_file_and_asks_about_it(curl, tmp_path, client):
    (tmp_path / "document.json").write_text(json.dumps({"text": TEXT + "The end.", "title": "mill"}))
    status, printed = curl("/v1/documents", "-d", "@document.json")
    assert status == 201
    name = json.loads(printed)["id"]
    body = {"model": NAME, "messages": QUESTION, "max_tokens": 6, "temperature": 0, "documents": [name]}
    status, printed = curl("/v1/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    assert status == 200
    answer = json.loads(printed)["choices"][0]["message"]["content"]
    assert answer == ask(client, extra_body={"documents": [name]}).choices[0].message.content
    status, printed = curl("/v1/chat/completions", "-N", "-d", json.dumps(body | {"stream": True}))
    assert status == 200
    *events, end = [line.removeprefix("data: ") for line in printed.split("\n\n") if line]
    assert end == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == answer
    assert curl(f"/v1/documents/{name}", "-X", "DELETE")[0] == 200


def test_curl_is_refused_without_the_key(curl):
    for key in (None, "wrong"):
        status, printed = curl("/v1/models", key=key)
        assert status == 401
        assert json.loads(printed)["error"]["code"] == "invalid_api_key"


def test_curl_sends_a_large_document_in_chunks(curl, tmp_path):
    """Beyond a mebibyte curl asks first whether it may send."""
    (tmp_path / "large.json").write_text(json.dumps({"text": "word " * 300_000}))
    status, printed = curl("/v1/documents", "-H", "Transfer-Encoding: chunked", "-d", "@large.json")
    assert status == 400
    assert json.loads(printed)["error"]["code"] == "context_length_exceeded"
