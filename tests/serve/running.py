"""A real server in a thread, on a free port of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn

from kvpress_moe.serve.loopback import listen


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server for this app, which ends with the block."""
    with listen(0) as listening:
        listening.listen()  # from now on, requests wait until the server is there
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, lifespan="on"))
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield "http://127.0.0.1:{1}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
