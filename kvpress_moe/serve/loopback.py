"""What every web app of this package needs: a socket, headers that protect the pages, and a way to run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvpress_moe.errors import SettingError

try:
    import uvicorn
    from starlette.requests import Request
except ImportError as error:
    raise SettingError(
        "serve", True, "the packages starlette and uvicorn", "pip install 'kvpress-moe[serve]'"
    ) from error

HOST = "127.0.0.1"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def own_origin(request: Request) -> str:
    """The origin of the app's own pages, as the requesting browser sees it."""
    return f"http://{request.headers['host']}"


def listen(port: int, host: str = HOST) -> socket.socket:
    """
    A socket on the loopback interface, or on another one; port 0 takes a free port.

    Raises
    ------
    SettingError
        If the port is taken, or there is no such host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise SettingError("port", port, "a free port", f"{error}. 0 takes any.") from error
    return listening


def run(app: Any, listening: socket.socket, on_start: Callable[[str], Any], lifespan: str = "off") -> None:
    """Serve until interrupted. ``on_start`` is called with the address."""
    host, port = listening.getsockname()[:2]
    on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan=lifespan,  # type: ignore[arg-type]
        timeout_graceful_shutdown=30,
    )
    with suppress(KeyboardInterrupt):  # uvicorn ends in order, then raises the signal again
        uvicorn.Server(config).run([listening])
