"""Every refusal in one form: `{"error": what was wrong and what to do}`, and the statuses that can occur."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from genrec.errors import DataError
from genrec.serving.bodies import Problem
from genrec.serving.store_error import StoreError

log = logging.getLogger(__name__)
STATUSES = {
    400: "the body is no JSON",
    401: "no API key, or none that is known",
    403: "the key lacks the scope, or the server is asked by a name that is not its own",
    408: "the body did not arrive in time",
    413: "the body is too large",
    422: "an unknown item or category, or a value out of range",
    429: "the tenant's rate limit; see Retry-After",
    500: "the engine failed at a text",
    503: "too many requests wait, the server is going down, or the user store does not answer; see Retry-After",
    504: "no text, or not even the user's history, before the deadline",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in STATUSES.items()
}
SHOWN = 5


class RefusalError(Exception):
    """An answer other than 2xx, on purpose.

    Args:
        status: of HTTP.
        text: what was found, what to do.
        reason: a word for metrics.
        retry_after_s: when the client may try again.
    """

    def __init__(self, status: int, text: str, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s

    def response(self, **headers: str) -> JSONResponse:
        """The answer."""
        found = dict(headers)
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return JSONResponse({"error": str(self)}, self.status, found)


class ClientLeftError(Exception):
    """Nobody waits for this answer any more."""


def _field_errors(err: RequestValidationError) -> str:
    """What is wrong with which field, without what was sent."""
    lines = [f"{'.'.join(str(part)[:50] for part in e['loc'])}: {e['msg']}" for e in err.errors()]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(line[:200] for line in lines[:SHOWN]) + more


def install(app: FastAPI) -> None:
    """Answer this package's errors, and everyone else's, as `Problem`s."""

    def problem(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.exception_handler(DataError)
    async def on_data_error(_: Request, err: DataError) -> Response:
        return problem(422, str(err))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, err: RequestValidationError) -> Response:
        return problem(422, _field_errors(err))

    @app.exception_handler(RefusalError)
    async def on_refusal(http: Request, err: RefusalError) -> Response:
        app.state.gateway.metrics.refusals.labels(err.reason).inc()
        return err.response()

    @app.exception_handler(StoreError)
    async def on_store(_: Request, err: StoreError) -> Response:
        log.error("%s", err)
        app.state.gateway.metrics.store_errors.labels(err.kind).inc()
        return problem(503, f"the user store is {err.kind}; try again", **{"retry-after": "1"})

    @app.exception_handler(ClientLeftError)
    async def on_left(_: Request, err: ClientLeftError) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, err: HTTPException) -> Response:
        return problem(err.status_code, str(err.detail), **(err.headers or {}))

    @app.exception_handler(Exception)
    async def on_bug(_: Request, err: Exception) -> Response:
        return problem(500, "internal error; the server's log says more")
