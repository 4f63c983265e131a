"""Everything the server refuses, in OpenAI's error format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

KINDS = {
    400: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
"""OpenAI's error types by status; others below 500 are invalid requests, others from 500 on server errors."""


class ApiError(HTTPException):
    """A request that is not answered, and why.

    Args:
        status: HTTP status.
        message: what was expected, what came.
        param: the request's field.
        code: OpenAI's machine-readable code.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the response, or of an event in a stream that has begun."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def queue_full(waiting: int, seconds: int) -> ApiError:
    """As many requests wait as may."""
    return ApiError(
        429, f"{waiting} requests are waiting already; try again in {seconds}s.", code="queue_full",
        headers={"Retry-After": str(seconds)},
    )  # fmt: skip


def shutting_down() -> ApiError:
    """No new request is taken, or an accepted one did not finish in time."""
    return ApiError(503, "the server is shutting down.", code="shutting_down", headers={"Retry-After": "30"})


def timed_out(seconds: float) -> ApiError:
    """The request's time is over. Clients are told not to try again at once: it would cost the same."""
    return ApiError(
        504, f"not finished within {seconds:g}s, the server's limit for a request; ask for fewer tokens.",
        code="timeout", headers={"x-should-retry": "false"},
    )  # fmt: skip


def failed() -> ApiError:
    """Something that was not foreseen; the server's log has the traceback."""
    return ApiError(500, "the server failed at this request; its log says why.", code="internal_error")
