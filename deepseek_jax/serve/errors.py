"""What a client is told when its call is not answered: the OpenAI API's errors, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A call that gets an error instead of an answer.

    Fields:
        status: HTTP status.
        message: what is wrong, and the remedy.
        param: the field of the body that is at fault, if one is.
        code: a word that programs may compare.
        headers: further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: the field `param` of the body is at fault."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def queue_full(waiting: int, limit: int) -> ApiError:
    """429: more continuations are under way than slots and queue hold."""
    return ApiError(
        429,
        f"{waiting} continuations are running or waiting, of {limit} that this server holds: try again later",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def stopping() -> ApiError:
    """503: the server finishes what it has and takes nothing new."""
    return ApiError(503, "the server is shutting down: send the call to another one", code="shutting_down")


def engine_failed(failure: BaseException) -> ApiError:
    """500: the engine raised; nothing can be answered any more."""
    return ApiError(500, f"the engine has failed: {type(failure).__name__}: {failure}", code="engine_failed")
