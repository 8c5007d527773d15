"""KnownHosts: refuses requests for other hosts. Else a page could reach the server through a name of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.loopback import HEADERS

from starlette.datastructures import Headers  # isort: skip  (loopback says what to install if it is missing)
from starlette.responses import JSONResponse  # isort: skip


class KnownHosts:
    """
    Middleware that refuses a ``Host`` header with another name, in the shape of OpenAI's errors.

    Parameters
    ----------
    app : ASGI app
    hosts : iterable of str
        Names without ports, IPv6 addresses in brackets; ``"*"`` allows all.
    """

    def __init__(self, app: Any, hosts: Iterable[str]):
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        answer = self.app
        if scope["type"] != "lifespan" and "*" not in self.hosts:
            host = Headers(scope=scope).get("host", "")
            if name_of(host) not in self.hosts:
                known = ", ".join(sorted(self.hosts))
                error = APIError(400, f"Host: got {host[:80]!r}, expected one of {known}.", code="unknown_host")
                answer = JSONResponse(error.as_dict(), status_code=error.status, headers=HEADERS)
        await answer(scope, receive, send)


def name_of(host: str) -> str:
    """The name in a ``Host`` header: in lower case, without a port."""
    name, colon, port = host.rpartition(":")
    has_port = colon and port.isdecimal() and not name.endswith(":")
    return (name if has_port else host).lower()
