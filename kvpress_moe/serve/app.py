"""The HTTP app: OpenAI's chat completions, models, documents, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any, TypeVar

from kvpress_moe.errors import CheckpointError, KVPressMoEError, SettingError, WriteError
from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.chat_request import ChatRequest, parse_body, parse_chat
from kvpress_moe.serve.document_request import DocumentRequest, parse_document
from kvpress_moe.serve.document_store import Document
from kvpress_moe.serve.engine import Engine, Piece
from kvpress_moe.serve.known_hosts import KnownHosts
from kvpress_moe.serve.loopback import HEADERS, own_origin
from kvpress_moe.serve.metrics import Metrics
from kvpress_moe.serve.openapi import openapi_document
from kvpress_moe.serve.scheduler import Job, Scheduler, Steps
from kvpress_moe.serve.web_page import page_routes
from kvpress_moe.serve.work import Compress

from starlette.applications import Starlette  # isort: skip  (loopback says what to install if it is missing)
from starlette.background import BackgroundTask  # isort: skip
from starlette.exceptions import HTTPException  # isort: skip
from starlette.middleware import Middleware  # isort: skip
from starlette.middleware.cors import CORSMiddleware  # isort: skip
from starlette.requests import ClientDisconnect, Request  # isort: skip
from starlette.responses import JSONResponse, Response, StreamingResponse  # isort: skip
from starlette.routing import Match, Route  # isort: skip

logger = logging.getLogger(__name__)

MAX_BODY = 16 * 2**20  # bytes of a request
LONG_BODY = 2**16  # longer ones are parsed in a thread
RETRY_AFTER = 2  # seconds that a client should wait if the queue is full
_POLL = 0.5  # seconds between looks whether a client is still there

Events = asyncio.Queue[tuple[str, Any]]
T = TypeVar("T")


def make_app(
    engine: Engine,
    scheduler: Scheduler,
    api_key: str | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    origins: Sequence[str] = (),
) -> Starlette:
    """
    Make the app.

    Parameters
    ----------
    engine : Engine
    scheduler : Scheduler
        It is closed when the app shuts down: jobs that are there are finished first.
    api_key : str, optional
        Requests must send it as ``Authorization: Bearer KEY``.
    hosts : tuple of str
        Host names that requests may name; ``"*"`` allows all.
    origins : sequence of str
        Other sites whose pages may ask, as ``https://chat.example``; ``"*"`` allows all.

    Raises
    ------
    SettingError
        If all sites are allowed without a key.
    """
    if "*" in origins and api_key is None:
        raise SettingError("origins", "*", "sites by name, or a key", "Every web page could read the documents.")
    metrics = Metrics(engine, scheduler)
    description = openapi_document(engine.name, api_key is not None)

    def route(path: str, endpoint: Callable[[Request], Any], method: str = "GET", needs_key: bool = True) -> Route:
        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            try:
                if api_key is None:
                    check_origin(request, origins)
                elif needs_key:
                    check_key(request, api_key)
                response: Response = await endpoint(request)
            except Exception as error:  # any error has OpenAI's shape
                if not isinstance(error, KVPressMoEError):
                    logger.exception("a request failed")
                response = refusal(as_api_error(error))
            except asyncio.CancelledError:  # the server ends, and has waited long enough
                response = refusal(APIError(503, "The server is shutting down."))
            metrics.count(path, response.status_code, time.perf_counter() - started)
            return response

        return Route(path, handle, methods=[method])

    async def models(request: Request) -> Response:
        model = {"id": engine.name, "object": "model", "created": 0, "owned_by": "kvpress-moe"}
        return reply({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        return reply({"status": "ok", "active": scheduler.n_active, "waiting": scheduler.n_waiting})

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type, headers=HEADERS)

    async def show_openapi(request: Request) -> Response:
        return reply(description)

    async def chat(request: Request) -> Response:
        asked = await parsed(request, parse_chat)
        if asked.model != engine.name:
            raise APIError(
                404, f"model: there is no model {asked.model!r}. It is {engine.name!r}.", "model", "model_not_found"
            )
        job, events = start(scheduler, lambda emit: engine.answer(asked))
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}
        first = await next_event(request, job, events)  # so that a refusal still has its own status
        if asked.stream:
            return streamed_by(job, stream(asked, first, job, events, about, metrics))
        text, piece, event = "", None, first
        try:
            while event[0] == "item":
                piece = event[1]
                text += piece.text
                if piece.finish:
                    break
                event = await next_event(request, job, events)
        finally:
            job.cancel()  # does nothing if the answer is complete
        assert piece is not None
        metrics.tokens(piece)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}
        return reply({**about, "object": "chat.completion", "choices": [choice], "usage": usage_of(piece)})

    async def add_document(request: Request) -> Response:
        asked = await parsed(request, parse_document)
        job, events = start(scheduler, partial(compressing, engine, asked))
        first = await next_event(request, job, events)
        if asked.stream:
            return streamed_by(job, document_stream(first, job, events))
        event = first
        while not isinstance(event[1], Document):
            event = await next_event(request, job, events)
        return reply(described(event[1]), 201)

    async def list_documents(request: Request) -> Response:
        found = await asyncio.to_thread(engine.store.documents)
        return reply({"object": "list", "data": [described(document) for document in found]})

    async def document_named(request: Request) -> Document:
        name = request.path_params["name"]
        document = await asyncio.to_thread(engine.store.find, name)
        if document is None or document.kind != "document":
            raise APIError(404, f"There is no document {name[:80]!r}.", code="not_found")
        return document

    async def show_document(request: Request) -> Response:
        return reply(described(await document_named(request)))

    async def delete_document(request: Request) -> Response:
        document = await document_named(request)
        await asyncio.to_thread(engine.store.delete, document.id)
        return reply({"id": document.id, "object": "document", "deleted": True})

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.scope['path']}"
        answer = refusal(APIError(error.status_code, f"{asked[:200]}: {error.detail}."))
        if error.status_code == 405:
            answer.headers["Allow"] = ", ".join(sorted(methods_of(request)))
        return answer

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    return Starlette(
        routes=[
            *page_routes(),
            route("/v1/models", models),
            route("/health", health, needs_key=False),
            route("/openapi.json", show_openapi, needs_key=False),
            route("/metrics", show_metrics),
            route("/v1/chat/completions", chat, "POST"),
            route("/v1/documents", add_document, "POST"),
            route("/v1/documents", list_documents),
            route("/v1/documents/{name}", delete_document, "DELETE"),
            route("/v1/documents/{name}", show_document),
        ],
        middleware=[
            Middleware(KnownHosts, hosts=hosts),
            *([allowing(origins)] if origins else []),
        ],
        exception_handlers={HTTPException: unknown},
        lifespan=lifespan,
    )


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_key(request: Request, api_key: str) -> None:
    """Raise APIError unless the request has the key that is demanded."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), api_key.encode()):
        raise APIError(401, "Authorization: expected 'Bearer KEY' with the server's key.", code="invalid_api_key")


def check_origin(request: Request, allowed: Sequence[str] = ()) -> None:
    """Raise APIError if a page of another site sends the request. A browser would do so without asking its user."""
    origin = request.headers.get("origin")
    if origin is not None and origin not in (own_origin(request), *allowed):
        raise APIError(
            403, "Origin: got another site's, expected none, this server's own, or one named with --allow-origin."
        )


def allowing(origins: Sequence[str]) -> Middleware:
    """
    Lets browsers give answers to pages of these sites (CORS). Clients in browsers send headers of their own.

    Chromium asks further whether pages of public sites may reach this machine.
    """
    knows_local = "allow_private_network" in signature(CORSMiddleware).parameters  # not in older releases of Starlette
    local: dict[str, Any] = {"allow_private_network": True} if knows_local else {}
    return Middleware(
        CORSMiddleware,
        **local,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


def methods_of(request: Request) -> set[str]:
    """The methods that the path of a request can be asked with."""
    routes = (one for one in request.app.routes if one.matches(request.scope)[0] != Match.NONE)
    return {method for one in routes for method in one.methods}


async def parsed(request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
    """What ``parse`` makes of a request's JSON object. Other requests go on while a long one is looked at."""
    body = await body_of(request)
    if len(body) <= LONG_BODY:
        return parse(parse_body(body))
    return await asyncio.to_thread(lambda: parse(parse_body(body)))


async def body_of(request: Request) -> bytes:
    """The body of a request. Raises APIError if it is too long, or if the client goes before its end."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise APIError(413, f"body: got more than {MAX_BODY // 2**20} MiB, expected less.")
    except ClientDisconnect as error:
        raise APIError(499, "The client is gone.") from error
    return bytes(body)


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(scheduler: Scheduler, steps: Callable[[Callable[[Any], Any]], Steps]) -> tuple[Job, Events]:
    """Submit a job. Its events come in a queue of the running loop."""
    loop, events = asyncio.get_running_loop(), Events()

    def put(kind: str, value: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (kind, value))

    job = Job(steps, put)
    scheduler.submit(job)
    return job, events


async def next_event(request: Request, job: Job, events: Events) -> tuple[str, Any]:
    """
    The next event of a job.

    Raises
    ------
    APIError
        If the job failed, or if the client is gone; the job is cancelled then.
    """
    while True:
        if time.monotonic() - job.last_look > _POLL:
            job.last_look = time.monotonic()
            if await request.is_disconnected():
                job.cancel()
                raise APIError(499, "The client is gone.")
        try:
            kind, value = await asyncio.wait_for(events.get(), _POLL)
        except TimeoutError:
            continue
        if kind == "error":
            raise as_api_error(value)
        return kind, value


def as_api_error(error: Exception) -> APIError:
    """What a client is told of an error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, WriteError):
        return APIError(507, "The server cannot write the document: no space or permission.", code="storage_full")
    if isinstance(error, CheckpointError):
        return APIError(404, "The document cannot be read any more. Post its text again.", code="not_found")
    if isinstance(error, KVPressMoEError):
        return APIError(400, str(error))
    return APIError(500, f"The server failed ({type(error).__name__}). Its log says more.")


def compressing(engine: Engine, asked: DocumentRequest, emit: Callable[[Any], Any]) -> Generator[Any, Any, None]:
    """A new document. It tells which layer it has reached."""
    prefix = engine.prefix_of(asked.text)
    yield (yield Compress(asked.title, prefix, on_layer=lambda done, total: emit((done, total))))


async def stream(
    asked: ChatRequest,
    event: tuple[str, Any],
    job: Job,
    events: Events,
    about: Mapping[str, Any],
    metrics: Metrics,
) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    base = {**about, "object": "chat.completion.chunk"}

    def chunk(delta: Mapping[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        return sse({**base, "choices": [choice]})

    piece: Piece | None = None
    try:
        yield chunk({"role": "assistant", "content": ""})
        while event[0] == "item":
            piece = event[1]
            assert piece is not None
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish:
                yield chunk({}, piece.finish)
                break
            event = await events.get()
        if event[0] == "error":
            yield sse(as_api_error(event[1]).as_dict())
        elif piece is not None:
            metrics.tokens(piece)
            if asked.include_usage:
                yield sse({**base, "choices": [], "usage": usage_of(piece)})
        yield "data: [DONE]\n\n"
    finally:
        job.cancel()  # does nothing if the answer is complete


async def document_stream(event: tuple[str, Any], job: Job, events: Events) -> AsyncIterator[str]:
    """Server-sent events of a new document: progress, then the document."""
    try:
        while event[0] == "item":
            if isinstance(event[1], Document):
                yield sse(described(event[1]))
                break
            yield sse({"object": "document.progress", "done": event[1][0], "total": event[1][1]})
            event = await events.get()
        if event[0] == "error":
            yield sse(as_api_error(event[1]).as_dict())
        yield "data: [DONE]\n\n"
    finally:
        job.cancel()


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def reply(data: Mapping[str, Any], status: int = 200) -> Response:
    return JSONResponse(dict(data), status_code=status, headers=HEADERS)


def streamed_by(job: Job, parts: AsyncIterator[str]) -> Response:
    """Server-sent events. The job ends with them, also if the client goes before the first one."""
    end = BackgroundTask(job.cancel)
    return StreamingResponse(parts, media_type="text/event-stream", headers=HEADERS, background=end)


def refusal(error: APIError) -> Response:
    headers = {**HEADERS, "Retry-After": str(RETRY_AFTER)} if error.status == 429 else HEADERS
    return JSONResponse(error.as_dict(), status_code=error.status, headers=headers)


def sse(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(dict(data), separators=(',', ':'))}\n\n"


def usage_of(piece: Piece) -> dict[str, Any]:
    """OpenAI's count of tokens, with those that a compressed cache held."""
    return {
        "prompt_tokens": piece.prompt_tokens,
        "completion_tokens": piece.completion_tokens,
        "total_tokens": piece.prompt_tokens + piece.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": piece.cached_tokens},
    }


def described(document: Document) -> dict[str, Any]:
    """A document as clients see it."""
    report = {} if document.report is None else asdict(document.report)
    return {
        "id": document.id,
        "object": "document",
        "title": document.title,
        "tokens": document.n_tokens,
        "bytes": document.n_bytes,
        "created": document.created,
        **report,
    }
