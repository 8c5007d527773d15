"""The explorer as a web app for this machine only (loopback). It uses the hub only for a router given by hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.errors import BusyError, SettingError
from kvpress_moe.experts.kvpress_scorers import KVPRESS_EXPERTS
from kvpress_moe.experts.registry import EXPERT_SETS, NAMED_EXPERTS, parse_experts
from kvpress_moe.explore.jobs import JobRunner
from kvpress_moe.explore.page import as_json, asset, assets, policy
from kvpress_moe.serve.loopback import HEADERS, HOST, own_origin

from starlette.applications import Starlette  # isort: skip  (loopback says what to install if it is missing)
from starlette.middleware import Middleware  # isort: skip
from starlette.middleware.trustedhost import TrustedHostMiddleware  # isort: skip
from starlette.requests import Request  # isort: skip
from starlette.responses import HTMLResponse, JSONResponse, Response  # isort: skip
from starlette.routing import Route  # isort: skip

MAX_BYTES = 4 * 2**20  # of a request; far more than a model can process


def make_app(runner: JobRunner, defaults: Mapping[str, Any]) -> Starlette:
    """
    Make the app.

    Requests whose host header is not this machine are refused, so that a foreign name that resolves to this machine can
    read nothing. Requests that a page of another site sends are refused too.

    Parameters
    ----------
    runner : JobRunner
    defaults : mapping
        What the form shows at first: ``text``, ``question``, ``ratio``, ``experts``, ``budget``, ``router``,
        ``precision``, ``max_kl``.
    """
    form, form_policy = form_page(runner, defaults)

    async def show_form(request: Request) -> Response:
        return HTMLResponse(form, headers={**HEADERS, "Content-Security-Policy": form_policy})

    async def submit(request: Request) -> Response:
        if request.headers.get("origin", own_origin(request)) != own_origin(request):
            return refusal(403, "This page does not belong to the app.")
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return refusal(415, "Expected application/json.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                return refusal(413, f"The text is too long: more than {MAX_BYTES // 2**20} MiB.")
        try:
            name = runner.submit(*parse(body))
        except BusyError as error:
            return refusal(409, str(error))
        except SettingError as error:
            return refusal(422, str(error))
        return JSONResponse({"job": name}, status_code=202, headers=HEADERS)

    async def progress(request: Request) -> Response:
        job = runner.jobs.get(request.path_params["job"])
        return JSONResponse(job.as_dict(), headers=HEADERS) if job else refusal(404, "There is no such job any more.")

    async def show_page(request: Request) -> Response:
        job, number = runner.jobs.get(request.path_params["job"]), request.path_params["number"]
        if job is None or number >= len(job.pages):
            return refusal(404, "There is no such page any more.")
        # the page contains its own policy; the sandbox gives it no origin, so it cannot send requests to the app
        headers = {**HEADERS, "Content-Security-Policy": "sandbox allow-scripts; frame-ancestors 'self'"}
        return HTMLResponse(job.pages[number], headers=headers)

    return Starlette(
        routes=[
            Route("/", show_form),
            Route("/jobs", submit, methods=["POST"]),
            Route("/jobs/{job}", progress),
            Route("/jobs/{job}/pages/{number:int}", show_page),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
    )


def refusal(status: int, message: str) -> Response:
    """A JSON response with the reason of a refusal."""
    return JSONResponse({"error": message}, status_code=status, headers=HEADERS)


def parse(body: bytes | bytearray) -> tuple[str, list[str], list[dict[str, Any]]]:
    """
    Text, questions and settings of a request.

    Raises
    ------
    SettingError
        If the form could not have sent this request.
    """
    try:
        request = json.loads(body)
        context, question, settings = str(request["text"]), str(request["question"]), request["settings"]
        presses = [
            {
                **size_of(setting),
                "experts": parse_experts(str(setting["experts"]).strip() or None),
                "budget": str(setting["budget"]) or None,
                "router": str(setting["router"]).strip() or None,
                "precision": parse_precision(str(setting["precision"]).strip() or None),
            }
            for setting in settings
        ]
    except SettingError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise SettingError(
            "request", f"{type(error).__name__}: {error}", "text, question and settings as JSON", "Use the form."
        ) from error
    if not 1 <= len(presses) <= 2:
        raise SettingError("settings", len(presses), "one, or two to compare", "Use the form.")
    return context, [question] if question.strip() else [], presses


def size_of(setting: Mapping[str, Any]) -> dict[str, float]:
    """How much stays: by a bound on the KL divergence if there is one, else by the ratio."""
    bound = str(setting.get("max_kl", "")).strip()
    return {"max_kl": float(bound)} if bound else {"compression_ratio": float(setting["ratio"])}


def form_page(runner: JobRunner, defaults: Mapping[str, Any]) -> tuple[str, str]:
    """The form's text and its Content-Security-Policy."""
    style, program = assets("app.css"), assets("app.js")
    config: Any = runner.model.config
    data = {
        "defaults": dict(defaults),
        "experts": sorted({*EXPERT_SETS, *NAMED_EXPERTS, *KVPRESS_EXPERTS}),
        "model": config.name_or_path.rstrip("/").split("/")[-1],
        "limit": config.get_text_config().max_position_embeddings,
    }
    text = asset("app.html").replace("{{style}}", style).replace("{{program}}", program)
    own = policy(style, program) + "; connect-src 'self'; frame-src 'self'; frame-ancestors 'none'"
    return text.replace("{{payload}}", as_json(data)), own
