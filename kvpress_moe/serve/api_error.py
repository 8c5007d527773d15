"""Errors in the shape that clients of OpenAI's API expect."""

from __future__ import annotations

import reprlib
from typing import Any

from kvpress_moe.errors import KVPressMoEError


class APIError(KVPressMoEError, ValueError):
    """
    A request that cannot be served.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
    param : str, optional
        The field that is wrong.
    code : str, optional
        A word that programs can compare.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def as_dict(self) -> dict[str, Any]:
        message = self.message.encode("utf-8", "backslashreplace").decode()  # lone surrogates
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


def wrong(field: str, got: object, expected: str, remedy: str = "") -> APIError:
    """The error for a field with a wrong value, in the words of all other errors of this package."""
    shown = got if isinstance(got, str) else reprlib.repr(got)  # of any depth and length
    return APIError(400, f"{field}: got {shown[:80]!r}, expected {expected}. {remedy}".rstrip(), field)
