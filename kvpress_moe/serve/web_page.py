"""The page at ``/``: add documents, see what was kept of them, and chat. It loads nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from kvpress_moe.serve.loopback import HEADERS

from starlette.exceptions import HTTPException  # isort: skip  (loopback says what to install if it is missing)
from starlette.requests import Request  # isort: skip
from starlette.responses import Response  # isort: skip
from starlette.routing import Route  # isort: skip

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_routes() -> list[Route]:
    """
    Routes for the page and its assets. They need no key: there is nothing of a document in them.

    All files are read here. So no name that a client sends is ever looked for on the disk.
    """
    found = {entry.name: entry for entry in files("kvpress_moe.serve").joinpath("assets").iterdir()}
    texts = {name: entry.read_bytes() for name, entry in found.items() if name.endswith(tuple(_TYPES))}

    def asset(name: str) -> Response:
        kind = _TYPES["." + name.rpartition(".")[2]]
        return Response(texts[name], media_type=kind, headers={**HEADERS, "Content-Security-Policy": POLICY})

    async def show_page(request: Request) -> Response:
        return asset("page.html")

    async def show_asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in texts or name == "page.html":
            raise HTTPException(404)
        return asset(name)

    return [Route("/", show_page), Route("/assets/{name}", show_asset)]
