"""kvpress-moe serve: answer OpenAI's API from compressed documents."""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.options import (
    Confidence,
    Device,
    MaxKL,
    Model,
    Router,
    check_number,
    check_out_directory,
    check_promise,
    is_given,
)
from kvpress_moe.cli.progress import progress_bar
from kvpress_moe.errors import SettingError

EPILOG = """Examples:

kvpress-moe serve --caches caches

kvpress-moe serve --caches caches --max-kl 0.02 --port 8080

curl -s http://127.0.0.1:8000/v1/documents -d '{"text": "The lease was signed by Anna Brandt."}'
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    command: typer.Context,
    caches: Annotated[
        Path, typer.Option(help="Directory of compressed documents; several servers may share it.")
    ] = Path("caches"),
    share: Annotated[
        float, typer.Option("--bytes", help="Share of a 16-bit cache's bytes that a document keeps. Not with --max-kl.")
    ] = 0.1,
    max_kl: MaxKL = None,
    confidence: Confidence = 0.9,
    router: Router = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than 127.0.0.1 need --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVPRESS_MOE_API_KEY", help="Key that clients must send as a bearer token.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Another site whose pages may ask, for example https://chat.example. Can be repeated. '*' allows all, "
            "and needs --api-key."
        ),
    ] = None,
    memory: Annotated[float, typer.Option(help="MiB of caches in memory. Others stay on disk.")] = 1024,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get status 429.")] = 64,
    active: Annotated[int, typer.Option(help="Requests that are computed together.")] = 16,
    attention: Annotated[
        str | None,
        typer.Option(
            help="torch; compiled: a small C library for CPUs, much faster; triton on a GPU. Default: compiled on "
            "a CPU with a C compiler, else torch."
        ),
    ] = None,
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """
    Serve chats about documents whose caches are compressed once.

    Any client of OpenAI's API can ask: POST /v1/chat/completions. POST /v1/documents adds a document.
    """
    check_promise(command, max_kl, confidence, None, None)
    if max_kl is not None and is_given(command, "share"):
        raise SettingError("bytes", share, "no --bytes with --max-kl", "Leave one out.")
    check_number("bytes", share, 0.01, 1)
    if share == 1 and router is not None:
        raise SettingError("router", router, "none with --bytes 1", "Nothing is compressed then. Leave one out.")
    check_number("port", port, 0, 65535, "0 takes any free port.")
    check_number("memory", memory, 1)
    check_number("queue", queue, 1)
    check_number("active", active, 1)
    if host not in LOOPBACK and not api_key:
        raise SettingError(
            "api_key",
            None,
            f"a key, because {host} can be reached from elsewhere",
            "Add --api-key, or leave --host out.",
        )
    origins = [checked_origin(origin, api_key) for origin in allow_origin or ()]
    if attention not in (None, "torch", "compiled", "triton"):
        raise SettingError("attention", attention, "torch, compiled or triton", "torch works everywhere.")
    if attention == "compiled" and device != "cpu":
        raise SettingError("attention", attention, f"torch or triton with --device {device}", "Leave it out.")
    check_out_directory(caches, "caches")
    with ExitStack() as stack:
        with progress_bar() as step:
            step("importing", total=1)
            from kvpress_moe.cache.attention_dispatch import check_implementation, use_ragged_attention
            from kvpress_moe.model.loading import DEFAULT_MODEL, load_model
            from kvpress_moe.model.support import check_model
            from kvpress_moe.press.moe_router_press import MoERouterPress
            from kvpress_moe.routers.checkpoint import directory_at
            from kvpress_moe.serve.app import make_app
            from kvpress_moe.serve.document_store import DocumentStore
            from kvpress_moe.serve.engine import Engine
            from kvpress_moe.serve.loopback import listen, run
            from kvpress_moe.serve.recipe import recipe_of
            from kvpress_moe.serve.scheduler import Scheduler

            attention = attention or fastest_attention(device)
            use_ragged_attention(attention)
            listening = stack.enter_context(closing(listen(port, host)))
            step("loading the model", total=1)
            loaded, tokenizer = load_model(model, device)
            check_model(loaded)
            check_implementation(loaded.config.get_text_config(decoder=True))
            if not tokenizer.chat_template:
                raise SettingError(
                    "model", model, "a model whose tokenizer has a chat template", "Use its instruct version."
                )
            press, directory = None, None
            if max_kl is not None or share < 1:
                size: dict[str, Any] = {"max_kl": max_kl, "confidence": confidence}
                if max_kl is None:
                    size = {"compression_ratio": 1 - share * 2 / loaded.dtype.itemsize}
                press = MoERouterPress(router=router, precision="mixed", cache_aware=False, **size)
                press.post_init_from_model(loaded)  # refuses what cannot be served before the first request
                if router is not None and press.routers is not None and press.routers.key_transforms:
                    directory = directory_at(router)
            recipe = recipe_of(loaded, tokenizer, press)
            store = DocumentStore(caches, loaded, recipe, int(memory * 2**20), directory)
            name = (model or DEFAULT_MODEL).rstrip("/").split("/")[-1]
            engine = Engine(loaded, tokenizer, store, press, name)
        scheduler = Scheduler(engine, active, queue)
        hosts = ("127.0.0.1", "localhost", "[::1]") if host in LOOPBACK else ("*",)
        app = make_app(engine, scheduler, api_key, hosts, origins)
        try:
            run(
                app,
                listening,
                lambda address: typer.echo(f"{address}/v1 (page: {address}/; {attention} attention; Ctrl+C ends)"),
                lifespan="on",
            )
        finally:  # after a second Ctrl-C nothing else has ended its thread
            scheduler.close(0)


def checked_origin(origin: str, api_key: str | None) -> str:
    """
    An origin as browsers send it: in lower case, without a path and a usual port.

    Raises
    ------
    SettingError
        If it is none, or if all sites would be allowed without a key.
    """
    if origin == "*":
        if not api_key:
            raise SettingError(
                "allow_origin", origin, "sites by name", "Every web page could read the documents. Or add --api-key."
            )
        return origin
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", origin, re.ASCII | re.I)
    if match is None or int(match[3] or 0) > 65535:
        raise SettingError(
            "allow_origin",
            origin,
            "one site as https://chat.example or http://localhost:3000",
            "Give scheme, host and port alone, and the option again for each further site.",
        )
    scheme, host, port = match[1].lower(), match[2].lower(), int(match[3] or 0)
    is_usual = port in (0, {"http": 80, "https": 443}.get(scheme))  # browsers leave it out
    return f"{scheme}://{host}" + ("" if is_usual else f":{port}")


def fastest_attention(device: str) -> str:
    """``"compiled"`` on a CPU where the C library can be built, else ``"torch"``."""
    from kvpress_moe.cache.compiled_products import find_compiler, library

    if device != "cpu" or find_compiler() is None:
        return "torch"
    try:
        library()
    except SettingError as error:
        typer.echo(f"Attention is computed by plain PyTorch, which is slower: {error}", err=True)
        return "torch"
    return "compiled"
